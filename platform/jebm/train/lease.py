"""Let one job at a time train a run, and free the run when that job dies.

    <run>/lease/00000003.json      the third holder: its identity, and a count that rises while it lives

Each holder has its own object, under the number after the newest, created by a conditional write: of several
jobs that start at once, or take over from a dead one at once, one succeeds. When its holder ends, the newest
object stays, marked as released, so that no number is reused. Clocks of two machines are never compared.

The lease protects the training run from an accidental second start. If it fails (a store without conditional
writes, a holder frozen for longer than others watched), the fence in `Checkpoints.save` still holds.
"""

import logging
import os
import re
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from types import TracebackType

from jebm.errors import ConfigError, StoreError
from jebm.store.sealed import READS, sealed, unsealed
from jebm.store.storage import ObjectChangedError, ObjectExistsError, ObjectMissingError, Store
from jebm.untrusted import JsonObject, typed, whole_number

__all__ = ["LastHolder", "Lease", "last_holder"]

_LOG = logging.getLogger("jebm.train")
_FOLDER = "lease/"
_KEY = re.compile(r"lease/(\d{8,15})\.json", re.ASCII)
_MOST = 10**15 - 1  # the highest holder number
_BYTES = 4096  # longer objects are not read
_LISTINGS = 5  # at most, until two agree
_BEAT_SECONDS = 5.0
_SILENT_BEATS = 6  # without a renewal the holder is considered dead: longer than a request that stalls
_LOOKS_PER_BEAT = 4

_FORMAT, _VERSION = "jebm-lease", 2
_TEXTS = {
    "token": re.compile(r"[0-9a-f]{32}"),
    "host": re.compile(r"[A-Za-z0-9_.-]{1,255}"),
    "since": re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII),
    "ray_job": re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,199})?"),
}
"""Allowed forms of a holder's texts: people read them, and paste some into a shell."""


@dataclass(frozen=True)
class _Holder:
    """The content of a lease object. `since` is only for people, in UTC; `ray_job` is "" outside Ray jobs."""

    token: str
    host: str
    pid: int
    since: str
    ray_job: str
    beat: int
    released: bool

    def encode(self) -> bytes:
        return sealed({**asdict(self), "format": _FORMAT, "version": _VERSION})

    @classmethod
    def decode(cls, encoded: bytes) -> "_Holder":
        """Return the holder; raises ValueError for anything but what `encode` writes."""
        content = unsealed(encoded, _BYTES)
        if (content.pop("format", None), content.pop("version", None)) != (_FORMAT, _VERSION):
            raise ValueError("it is no lease of this version")
        holder = cls(
            **{name: _text(content, name) for name in _TEXTS},
            pid=whole_number(content, "pid", 1, 2**32),
            beat=whole_number(content, "beat", 0, 2**53),
            released=typed(content, "released", bool),
        )
        if holder.encode() != encoded:
            raise ValueError("it has unknown fields")
        return holder

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, since {self.since}"

    @property
    def stop_command(self) -> str:
        """The command that stops the holder, built here from a number or a name without odd characters."""
        return f"ray job stop {self.ray_job}" if self.ray_job else f"kill {self.pid}"


def _text(content: JsonObject, name: str) -> str:
    text = typed(content, name, str)
    if not _TEXTS[name].fullmatch(text):
        raise ValueError(f"{name} has another form")
    return text


@dataclass(frozen=True)
class _Place:
    """A lease object: its number, and what changes when it is rewritten."""

    number: int
    etag: str

    @property
    def key(self) -> str:
        return _key(self.number)


class Lease:
    """Holds the run within a `with` block; entering may take three beats if the last holder died."""

    def __init__(
        self, store: Store, *, ray_job: str | None = None, beat_seconds: float = _BEAT_SECONDS
    ) -> None:
        """Prepare to hold the run whose own store is `store`.

        `ray_job` is the submission ID of the Ray job that this process drives; refusals name it.
        """
        self._store, self._beat_seconds = store, beat_seconds
        self._number = 0
        self._holder = _Holder(
            token=uuid.uuid4().hex,
            host=re.sub(r"[^A-Za-z0-9_.-]", "-", socket.gethostname())[:255] or "unknown",
            pid=os.getpid(),
            since=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            ray_job=ray_job if ray_job and _TEXTS["ray_job"].fullmatch(ray_job) else "",
            beat=0,
            released=False,
        )
        self._end, self._lost = threading.Event(), False
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        """Take the lease; from an unreleased holder only after watching it stay silent.

        Raises:
            ConfigError: another live job holds it, or was faster.
            StoreError: the store cannot be reached, read or written.
        """
        newest = _newest(self._store)
        if newest is not None and newest.number >= _MOST:
            raise ConfigError(
                f"run.name: {self._store.uri}/{newest.key} leaves no number for another job, and is of none "
                "of ours; delete this object, or choose another run.name"
            )
        if newest is not None and not self._released(newest):
            newest = self._outlive(newest)
        self._number = 1 if newest is None else newest.number + 1
        self._claim()
        newest = _newest(self._store)
        if newest is not None and newest.number > self._number:  # our number was free only because it is old
            self._store.delete([_key(self._number)])
            raise self._refusal(newest.number)
        self._store.delete([place.key for place in _places(self._store) if place.number < self._number])
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
            self._store.put(_key(self._number), replace(self._holder, released=True).encode())
        except StoreError as failure:
            _LOG.warning("the run's lease could not be released, the next start must wait: %s", failure)

    def _read(self, number: int) -> _Holder | None:
        """Return an object's holder; None if it is gone or not in this version's format."""
        for _ in range(READS):
            try:
                info = self._store.head(_key(number))
                if info is None or info.size > _BYTES:
                    return None
                encoded = bytearray(info.size)  # read no more, even if the object has grown
                self._store.read_into(info.key, 0, [memoryview(encoded)])
                return _Holder.decode(bytes(encoded))
            except (ObjectChangedError, ObjectMissingError, ValueError):
                continue
        return None

    def _released(self, place: _Place) -> bool:
        holder = self._read(place.number)
        return holder is not None and holder.released

    def _outlive(self, seen: _Place) -> _Place | None:
        """Return the newest object once its holder has ended or been silent for long enough.

        Raises:
            ConfigError: the holder is alive; raised as soon as it renews.
        """
        silence = _SILENT_BEATS * self._beat_seconds
        holder = self._read(seen.number) or f"an unknown process ({seen.key} cannot be read)"
        _LOG.info("run %s is held by %s; watching it for %.0f s", self._store.uri, holder, silence)
        deadline = time.monotonic() + silence
        while time.monotonic() < deadline:
            time.sleep(self._beat_seconds / _LOOKS_PER_BEAT)
            asked = time.monotonic()
            newest = _newest(self._store)
            if newest is None or self._released(newest):
                return newest
            if newest != seen:
                raise self._refusal(newest.number)
            if time.monotonic() - asked > self._beat_seconds:  # the store was unavailable, for the holder too
                deadline = time.monotonic() + silence
        _LOG.info("%s has shown no life: this process goes on with the run", holder)
        return seen

    def _claim(self) -> None:
        """Write this holder's object.

        Raises:
            ConfigError: another job has just written it.
        """
        key, content = _key(self._number), self._holder.encode()
        try:
            self._store.put(key, content, if_absent=True)
        except ObjectExistsError:
            # Ours if the response to a first try was lost.
            if self._read(self._number) != self._holder:
                raise self._refusal(self._number) from None
        try:
            self._store.put(key, content, if_absent=True)
        except ObjectExistsError:
            if "conditional writes" not in self._store.limits:
                return
        # The store ignores conditions. If two jobs write in turn, only the second reads itself back.
        _LOG.warning("%s has no conditional writes: looking again for a second job", self._store.uri)
        time.sleep(self._beat_seconds)
        if self._read(self._number) != self._holder:
            raise self._refusal(self._number)

    def _refusal(self, number: int) -> ConfigError:
        holder = self._read(number)
        return ConfigError(
            f"run.name: {self._store.uri} is in training by {holder or 'another process'}; "
            + (f"stop it there ({holder.stop_command}), " if holder else f"stop it ({_key(number)}), ")
            + "or choose another run.name"
        )

    def _renew(self) -> None:
        """Renew at every beat until stopped; a failed renewal is retried at the next beat."""
        store = self._store.patient(0)
        failing = False
        while not self._end.wait(self._beat_seconds):
            try:
                newest = _newest(store)
                if newest is not None and newest.number > self._number:
                    self._lost = True
                    holder = self._read(newest.number) or f"another process ({newest.key})"
                    _LOG.error("%s has taken over this run: stop one of the two", holder)
                    return
                self._holder = replace(self._holder, beat=self._holder.beat + 1)
                store.put(_key(self._number), self._holder.encode())
            except StoreError as error:
                if not failing:
                    _LOG.warning("the run's lease cannot be renewed, trying on: %s", error)
                failing = True
            else:
                failing = False


@dataclass(frozen=True)
class LastHolder:
    """A run's present or last holder: a description, whether it has ended, its last renewal, and its start.

    The start is by the holder's clock; None if it cannot be read.
    """

    description: str
    released: bool
    renewed: datetime
    since: datetime | None = None


def last_holder(store: Store) -> LastHolder | None:
    """Return the last holder of the run in `store`; None if it never had one. Neither takes nor watches.

    Raises:
        StoreError: the store cannot be reached.
    """
    place = _newest(store)
    info = None if place is None else store.head(place.key)
    if place is None or info is None:
        return None
    holder = Lease(store)._read(place.number)
    words = str(holder or f"an unknown process ({place.key} cannot be read)")
    since = None
    with suppress(ValueError):  # no such day
        since = datetime.fromisoformat(holder.since) if holder else None
    return LastHolder(words, holder is not None and holder.released, info.modified, since)


def _key(number: int) -> str:
    return f"{_FOLDER}{number:08d}.json"


def _places(store: Store) -> list[_Place]:
    """Return the lease's objects, ignoring anything else, such as other spellings of a number."""
    places = []
    for info in store.list(_FOLDER):
        match = _KEY.fullmatch(info.key)
        if match is not None and _key(int(match[1])) == info.key:
            places.append(_Place(int(match[1]), info.etag))
    return places


def _newest(store: Store) -> _Place | None:
    """Return the newest object once two listings in a row agree: a bit in one may be flipped."""
    seen: _Place | None = None
    for look in range(_LISTINGS):
        newest = max(_places(store), key=lambda place: place.number, default=None)
        if look and newest == seen:
            break
        seen = newest
    return seen
