"""Who trains a run: one job at a time, and a dead job's place is free.

    <run>/lease/00000003.json      of the third holder: who it is, and a count that goes up while it lives

Each holder has an object of its own, under the number after the newest one, got by a conditional write: of
several that start at once, or follow a dead one at once, one gets it. The newest object stays when its holder
has ended, marked as released, so that no number comes twice. Clocks of two machines are never compared.

It spares the run that trains an accidental second start. Where it fails (a store without conditional writes,
a holder that was frozen for longer than others watched), the fence in `Checkpoints.save` still holds.
"""

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from types import TracebackType

from jebm.errors import ConfigError, StoreError
from jebm.store.storage import ObjectExistsError, ObjectInfo, ObjectMissingError, Store

__all__ = ["Lease"]

_LOG = logging.getLogger("jebm.train")
_FOLDER = "lease/"
_KEY = re.compile(r"lease/\d{8}\.json")
_BEAT_SECONDS = 5.0
_SILENT_BEATS = 3  # so many missed, and the holder counts as dead
_LOOKS_PER_BEAT = 4


@dataclass(frozen=True)
class _Holder:
    """What an object of the lease says. `since` is for people alone, in UTC."""

    token: str
    host: str
    pid: int
    since: str
    stop: str
    beat: int
    released: bool

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, since {self.since}"


class Lease:
    """Within it, this process holds the run; entering may take three beats, where the last holder died."""

    def __init__(
        self, store: Store, *, stop_command: str | None = None, beat_seconds: float = _BEAT_SECONDS
    ) -> None:
        """Prepare to hold the run in `store`, the store of the run itself.

        `stop_command` is what another one is told to stop this holder with; None is `kill` and the process.
        """
        self._store, self._beat_seconds = store, beat_seconds
        self._key = ""
        self._holder = _Holder(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            stop=stop_command or f"kill {os.getpid()}",
            beat=0,
            released=False,
        )
        self._end, self._lost = threading.Event(), False
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        """Take the lease, from a dead holder once it has been watched.

        Raises:
            ConfigError: another live job holds it, or has been faster.
            StoreError: the store cannot be reached, read or written.
        """
        newest = _newest(self._store)
        if newest is not None and not self._released(newest):
            newest = self._outlive(newest)
        number = 0 if newest is None else int(newest.key.removeprefix(_FOLDER).removesuffix(".json"))
        self._key = f"{_FOLDER}{number + 1:08d}.json"
        self._claim()
        keys = [info.key for info in _objects(self._store)]
        if max(keys, default="") > self._key:  # we were slow: this number was free since it is long past
            self._store.delete([self._key])
            raise self._refusal(max(keys))
        self._store.delete([key for key in keys if key < self._key])
        self._thread.start()
        return self

    def check(self) -> None:
        """Raise `ConfigError` if another live job holds the run; takes nothing. Waits as entering does."""
        newest = _newest(self._store)
        if newest is not None and not self._released(newest):
            self._outlive(newest)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if self._lost:
            return
        try:
            self._store.put(self._key, replace(self._holder, released=True).encode())
        except StoreError as failure:
            _LOG.warning("the run's lease could not be released, the next start must wait: %s", failure)

    def _read(self, key: str) -> _Holder | None:
        """Return what an object says; None where it is gone, or not one of ours."""
        try:
            return _Holder(**json.loads(self._store.get(key)))
        except (ObjectMissingError, TypeError, ValueError):
            return None

    def _released(self, info: ObjectInfo) -> bool:
        holder = self._read(info.key)
        return holder is not None and holder.released is True

    def _outlive(self, seen: ObjectInfo) -> ObjectInfo | None:
        """Return the newest object once its holder has ended, or has been silent for long enough.

        Raises:
            ConfigError: as soon as it shows life.
        """
        silence = _SILENT_BEATS * self._beat_seconds
        holder = self._read(seen.key) or "an unknown process"
        _LOG.info("run %s is held by %s; watching it for %.0f s", self._store.uri, holder, silence)
        deadline = time.monotonic() + silence
        while time.monotonic() < deadline:
            time.sleep(self._beat_seconds / _LOOKS_PER_BEAT)
            asked = time.monotonic()
            newest = _newest(self._store)
            if newest is None or self._released(newest):
                return newest
            if (newest.key, newest.etag) != (seen.key, seen.etag):
                raise self._refusal(newest.key)
            if time.monotonic() - asked > self._beat_seconds:  # the store was away, for the holder too
                deadline = time.monotonic() + silence
        _LOG.info("%s has shown no life: this process goes on with the run", holder)
        return seen

    def _claim(self) -> None:
        """Write the object of this holder.

        Raises:
            ConfigError: another one has just written it.
        """
        content = self._holder.encode()
        try:
            self._store.put(self._key, content, if_absent=True)
        except ObjectExistsError:
            if self._read(self._key) != self._holder:  # it is ours where the answer to a first try was lost
                raise self._refusal(self._key) from None
        try:
            self._store.put(self._key, content, if_absent=True)
        except ObjectExistsError:
            return
        # The store does not heed conditions. Of two that write one after the other, the second finds itself.
        _LOG.warning("%s has no conditional writes: looking again for a second job", self._store.uri)
        time.sleep(self._beat_seconds)
        if self._read(self._key) != self._holder:
            raise self._refusal(self._key)

    def _refusal(self, key: str) -> ConfigError:
        holder = self._read(key)
        return ConfigError(
            f"run.name: {self._store.uri} is in training by {holder or 'another process'}; "
            + (f"stop it there ({holder.stop}), " if holder else "stop it, ")
            + "or choose another run.name"
        )

    def _renew(self) -> None:
        """Beat until the end; what fails is tried again at the next beat."""
        store = self._store.patient(0)
        failing = False
        while not self._end.wait(self._beat_seconds):
            try:
                newest = _newest(store)
                if newest is not None and newest.key > self._key:
                    self._lost = True
                    _LOG.error("%s has taken over this run: stop one of the two", self._read(newest.key))
                    return
                self._holder = replace(self._holder, beat=self._holder.beat + 1)
                store.put(self._key, self._holder.encode())
            except StoreError as error:
                if not failing:
                    _LOG.warning("the run's lease cannot be renewed, trying on: %s", error)
                failing = True
            else:
                failing = False


def _objects(store: Store) -> list[ObjectInfo]:
    return [info for info in store.list(_FOLDER) if _KEY.fullmatch(info.key)]


def _newest(store: Store) -> ObjectInfo | None:
    return max(_objects(store), key=lambda info: info.key, default=None)
