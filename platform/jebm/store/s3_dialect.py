"""What a server lacks of S3, found out by its refusals, and what we do instead.

Servers that speak S3 refuse different parts of it, each with codes of its own. So no list says who refuses
what: if a request is refused for its form and the same request without one of its optional parts is not, then
the server lacks that part. This is remembered for the bucket as long as the process lives.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import combinations
from typing import Literal, TypeAlias, TypeVar

from botocore.exceptions import ClientError

from jebm.errors import StoreError
from jebm.store.protocol import ObjectExistsError, one_line
from jebm.store.s3_errors import NoContinuationError, code_of, is_bare, refuses_form, status_of, transient

__all__ = ["Dialect", "Feature", "dialect_of"]

Feature: TypeAlias = Literal[
    "checksums", "conditional writes", "multi-delete", "listing V2", "listing uploads"
]

_INSTEAD: Mapping[Feature, str] = {
    "checksums": "uploads go without; what is read is still compared with the manifest's CRC32s",
    "conditional writes": "we look before we write; only the lease of a run keeps a second job out",
    "multi-delete": "objects are deleted one by one",
    "listing V2": "listings are of the first version",
    "listing uploads": "uploads that never ended cannot be found; let the bucket's lifecycle rule end them",
}
_AGAIN = 2
_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class Dialect:
    """What one bucket's server was found to lack; safe to share between threads."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._lacking: dict[str, str] = {}

    @property
    def lacking(self) -> Mapping[str, str]:
        """What is lacking, each with a sentence: why we think so, and what is done instead."""
        return dict(self._lacking)

    def has(self, feature: Feature) -> bool:
        """Whether the feature may be used: it was not refused yet."""
        return feature not in self._lacking

    def learn(self, feature: Feature, reason: Exception | str) -> None:
        """Remember that the server lacks a feature, and say so the first time."""
        if isinstance(reason, ClientError):
            reason = f"{code_of(reason)}: {reason.response.get('Error', {}).get('Message', '')}"
        with self._lock:
            if feature in self._lacking:
                return
            self._lacking[feature] = f"no {feature} here ({one_line(reason)[:200]}): {_INSTEAD[feature]}"
        _logger.warning("%s: %s", self._name, self._lacking[feature])

    def tried(self, features: Collection[Feature], send: Callable[[Collection[Feature]], _T]) -> _T:
        """Return `send(features)`, made without those that the server lacks.

        If the server refuses the request for its form, it is made again without each feature, then without
        several; a refusal that does not come from S3 must come three times. Raises the first refusal if that
        does not help either.
        """
        wanted = [feature for feature in features if self.has(feature)]
        try:
            return send(wanted)
        except (ClientError, NoContinuationError) as first:
            if not refuses_form(first):
                raise
            if is_bare(first):  # perhaps by somebody on the way, who may not do it again
                for _ in range(_AGAIN):
                    with contextlib.suppress(ClientError):
                        return send(wanted)
            for left_out in _subsets(wanted):
                try:
                    answer = send([feature for feature in wanted if feature not in left_out])
                except ObjectExistsError:
                    raise
                except StoreError:  # it could not even be made
                    continue
                except (ClientError, NoContinuationError) as error:
                    if refuses_form(error):
                        continue
                    if transient(error):
                        raise
                    if not isinstance(error, ClientError) or status_of(error) != 412:
                        continue
                    # An answer to a request that was understood.
                    self._learn_all(left_out, first)
                    raise
                self._learn_all(left_out, first)
                return answer
            raise

    def _learn_all(self, features: Collection[Feature], reason: Exception) -> None:
        for feature in features:
            self.learn(feature, reason)


def _subsets(features: Collection[Feature]) -> Iterator[Collection[Feature]]:
    """Yield every choice of at least one feature, small ones first."""
    for count in range(1, len(features) + 1):
        yield from combinations(features, count)


@functools.cache
def dialect_of(endpoint: str, bucket: str) -> Dialect:
    """Return the one dialect of a bucket in this process."""
    return Dialect(f"s3://{bucket} at {endpoint}")
