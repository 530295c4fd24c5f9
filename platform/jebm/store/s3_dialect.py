"""Which S3 features a server lacks, learned from its refusals, and what we do instead.

S3-compatible servers refuse different features, with different error codes. So we keep no list of servers: if
a request is refused for its form and the same request without one optional feature is not, then the server
lacks that feature. This is remembered per bucket for the life of the process.
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
    """The features that one bucket's server lacks; safe to share between threads."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._lacking: dict[str, str] = {}

    @property
    def lacking(self) -> Mapping[str, str]:
        """The missing features, each with a sentence: the evidence and the workaround."""
        return dict(self._lacking)

    def has(self, feature: Feature) -> bool:
        """Return whether the feature may be used: it has not been refused so far."""
        return feature not in self._lacking

    def learn(self, feature: Feature, reason: Exception | str) -> None:
        """Remember that the server lacks a feature, and log it the first time."""
        if isinstance(reason, ClientError):
            reason = f"{code_of(reason)}: {reason.response.get('Error', {}).get('Message', '')}"
        with self._lock:
            if feature in self._lacking:
                return
            self._lacking[feature] = f"no {feature} here ({one_line(reason)[:200]}): {_INSTEAD[feature]}"
        _logger.warning("%s: %s", self._name, self._lacking[feature])

    def tried(self, features: Collection[Feature], send: Callable[[Collection[Feature]], _T]) -> _T:
        """Return `send(features)`, leaving out those that the server lacks.

        If the server refuses the request's form, it is retried without each feature, then without several; a
        refusal without an S3 code must occur three times. Raises the first refusal if none of this helps.
        """
        wanted = [feature for feature in features if self.has(feature)]
        try:
            return send(wanted)
        except (ClientError, NoContinuationError) as first:
            if not refuses_form(first):
                raise
            if is_bare(first):  # perhaps from a proxy, and not repeatable
                for _ in range(_AGAIN):
                    with contextlib.suppress(ClientError):
                        return send(wanted)
            for left_out in _subsets(wanted):
                try:
                    answer = send([feature for feature in wanted if feature not in left_out])
                except ObjectExistsError:
                    raise
                except StoreError:  # the request could not even be made
                    continue
                except (ClientError, NoContinuationError) as error:
                    if refuses_form(error):
                        continue
                    if transient(error):
                        raise
                    if not isinstance(error, ClientError) or status_of(error) != 412:
                        continue
                    # The server understood this request.
                    self._learn_all(left_out, first)
                    raise
                self._learn_all(left_out, first)
                return answer
            raise

    def _learn_all(self, features: Collection[Feature], reason: Exception) -> None:
        for feature in features:
            self.learn(feature, reason)


def _subsets(features: Collection[Feature]) -> Iterator[Collection[Feature]]:
    """Yield every non-empty subset of the features, smallest first."""
    for count in range(1, len(features) + 1):
        yield from combinations(features, count)


@functools.cache
def dialect_of(endpoint: str, bucket: str) -> Dialect:
    """Return the bucket's dialect, shared within this process."""
    return Dialect(f"s3://{bucket} at {endpoint}")
