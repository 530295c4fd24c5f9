"""Download what a run left in its storage, except checkpoints, to a local folder.

Object names are untrusted. Nothing is written outside the folder; an object that cannot be a file there is
reported and the others are downloaded. A file gets its name only when complete.
"""

import errno
import os
import stat
import tempfile
import unicodedata
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from jebm.config.names import MARKERS, RUN_FOLDERS
from jebm.errors import StoreError
from jebm.store.manifest import step_and_attempt
from jebm.store.protocol import (
    PART_THREADS,
    PARTIAL,
    BucketMissingError,
    EndpointError,
    ObjectChangedError,
    ObjectInfo,
    ObjectMissingError,
    Store,
    checked_key,
    os_errors,
)
from jebm.store.storage import LocalStore
from jebm.untrusted import encoded_json, parsed_object

__all__ = ["RECORD", "Fetched", "Plan", "fetch_results", "planned"]

RECORD = ".fetched.json"
"""Records what was fetched, so that the next fetch downloads only what has changed."""

_SLICE_BYTES = 4 << 20  # per thread
_RECORD_BYTES = 64 << 20
_TRIES = 3  # for a file that a run is writing
_SHOWN = 20  # runs named in an error
_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # these would fail every other file too


@dataclass(frozen=True)
class Fetched:
    """The result of a fetch; `refused` has one line for each object not downloaded, with the reason."""

    files: int
    bytes: int
    unchanged: int
    refused: Sequence[str]


@dataclass
class Plan:
    """The work to do, determined before anything is read."""

    wanted: list[ObjectInfo] = field(default_factory=list)
    unchanged: dict[str, ObjectInfo] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


def fetch_results(store: Store, folder: Path, begin: Callable[[int], Callable[[int], object]]) -> Fetched:
    """Download changed files of the run, sweep or comparison in `store` to the folder, several at a time.

    `begin(bytes to read)` returns a function that is called with the size of each finished object.

    Raises:
        StoreError: the store cannot be read or the folder written; there are no results, or results of
            several runs (the message names them); the folder lies within the store.
    """
    # Refuse before anything is created.
    folder = Path(os.path.realpath(folder))
    if isinstance(store, LocalStore) and folder.is_relative_to(store.folder):
        raise StoreError(f"{folder}: lies within {store.uri}; give another folder to write to")
    results = _results(store)
    # Partial files get a folder of their own, on the same file system.
    with ExitStack() as stack:
        stack.enter_context(os_errors(f"{folder}: cannot be written"))
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder)))
        known = _read_record(folder, store.uri)
        plan = planned(
            results,
            folds_case=_folds_case(scratch),
            is_unchanged=lambda info: _is_unchanged(folder, info, known),
        )
        # However this ends, record what was downloaded.
        here = dict(plan.unchanged)
        try:
            progress = begin(sum(info.size for info in plan.wanted))
            with closing(_brought(store, plan.wanted, folder, scratch)) as outcomes:
                for info, outcome in outcomes:
                    progress(info.size)
                    if isinstance(outcome, str):
                        plan.refused.append(outcome)
                    else:
                        here[info.key] = outcome
        finally:
            _write_record(folder, scratch, store.uri, here)
    brought = [info.size for key, info in here.items() if key not in plan.unchanged]
    return Fetched(len(brought), sum(brought), len(plan.unchanged), sorted(plan.refused))


def planned(
    infos: Iterable[ObjectInfo], *, folds_case: bool, is_unchanged: Callable[[ObjectInfo], bool]
) -> Plan:
    """Return which objects to download: those that can coexist as files in one folder.

    With `folds_case`, the folder treats `a` and `A` as one name. If a key is also a folder of others, or two
    keys share a name, the one with more below it wins, else the first.
    """
    infos = sorted(infos, key=lambda info: info.key)
    plan = Plan()

    def folded(key: str) -> str:
        return unicodedata.normalize("NFC", key).casefold() if folds_case else key

    folders = {folded(folder) for info in infos for folder in _folders_of(info.key)}
    names: dict[str, str] = {}
    # Refuse names that cannot be files here, then names that collide.
    for info in infos:
        name = folded(info.key)
        try:
            info.key.encode()
            checked_key(info.key)
        except UnicodeEncodeError:
            plan.refused.append(f"{info.key}: its name is not UTF-8")
        except StoreError as error:
            plan.refused.append(str(error))
        else:
            if info.key == RECORD:
                plan.refused.append(f"{info.key}: this name is taken by the record of what was fetched")
            elif name in folders:
                plan.refused.append(f"{info.key}: other objects lie below this name, as if it were a folder")
            elif name in names:
                plan.refused.append(f"{info.key}: is the same name as {names[name]} in this folder")
            elif is_unchanged(info):
                plan.unchanged[info.key] = info
            else:
                plan.wanted.append(info)
            names.setdefault(name, info.key)
    return plan


def _results(store: Store) -> list[ObjectInfo]:
    """List the results of a run, sweep or comparison; raises StoreError if the store holds none of these."""
    if any(step_and_attempt(name) for name in store.uri.split("/")):
        raise StoreError(f"{store.uri}: is a checkpoint; jebm checkpoints get brings it")
    results: list[ObjectInfo] = []
    places: set[tuple[str, ...]] = set()  # of runs, sweeps and comparisons
    for info in store.list():
        *above, name = info.key.split("/")
        depth = next((n for n, at in enumerate(above) if at in RUN_FOLDERS or step_and_attempt(at)), None)
        if depth is not None:
            places.add(tuple(above[:depth]))
            continue
        if name in MARKERS:
            places.add(tuple(above))
        results.append(info)
    # Distinguish one run from a folder of several.
    if not places and not results:
        raise StoreError(f"{store.uri}: holds no results of a run; give run.storage/run.name")
    if places and () not in places:
        names = sorted("/".join(place) for place in places if not _within(place, places))
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise StoreError(
            f"{store.uri}: is not a run but holds {', '.join(names[:_SHOWN])}{more}; "
            f"give one of them, such as {store.uri}/{names[0]}"
        )
    if not results:
        raise StoreError(f"{store.uri}: holds no results yet, or only checkpoints (jebm checkpoints get)")
    return results


def _within(place: tuple[str, ...], places: set[tuple[str, ...]]) -> bool:
    return any(place[:depth] in places for depth in range(len(place)))


def _folders_of(key: str) -> Iterator[str]:
    above = key.split("/")[:-1]
    yield from ("/".join(above[: depth + 1]) for depth in range(len(above)))


def _brought(
    store: Store, wanted: Sequence[ObjectInfo], folder: Path, scratch: Path
) -> Generator[tuple[ObjectInfo, ObjectInfo | str]]:
    """Download objects, several at a time; yield each with what was downloaded, or a line with the reason."""
    stop = Event()

    def bring(info: ObjectInfo) -> ObjectInfo | str:
        partial = scratch / uuid.uuid4().hex
        try:
            found = _downloaded(store, info, partial, stop)
            _put_in_place(partial, folder, found.key)
        except (EndpointError, BucketMissingError):
            raise
        except ObjectMissingError:
            return f"{info.key}: was deleted meanwhile"
        except StoreError as error:
            return f"{info.key}: {error}"
        except OSError as error:
            if error.errno in _FATAL:
                raise
            return f"{info.key}: cannot be written here: {error.strerror or error}"
        else:
            return found
        finally:
            partial.unlink(missing_ok=True)

    # If the caller stops iterating, the threads stop too.
    with ThreadPoolExecutor(PART_THREADS, thread_name_prefix="jebm-fetch") as pool:
        futures = {pool.submit(bring, info): info for info in wanted}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _downloaded(store: Store, info: ObjectInfo, partial: Path, stop: Event) -> ObjectInfo:
    """Write an object to a new file and return its metadata; retry if it changes meanwhile."""
    for _ in range(_TRIES):
        try:
            with partial.open("wb") as file:
                buffer, read = memoryview(bytearray(min(info.size, _SLICE_BYTES))), 0
                while read < info.size:
                    if stop.is_set():
                        raise StoreError("interrupted")
                    piece = buffer[: info.size - read]
                    store.read_into(info.key, read, [piece], etag=info.etag)
                    file.write(piece)
                    read += piece.nbytes
            return info
        except ObjectChangedError:
            newer = store.head(info.key)
            if newer is None:
                raise ObjectMissingError(info.key) from None
            info = newer
    raise StoreError("changes faster than it can be read")


def _put_in_place(partial: Path, folder: Path, key: str) -> None:
    """Move a file to its final name; raises StoreError if a link leads out of the folder, and OSError."""
    path = folder / key
    if not Path(os.path.realpath(path.parent)).is_relative_to(folder):
        raise StoreError(f"a symbolic link at {path.parent} leads out of {folder}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(path)


def _folds_case(scratch: Path) -> bool:
    """Return whether the file system ignores case in names."""
    (scratch / "case").touch()
    return (scratch / "CASE").exists()


def _is_unchanged(folder: Path, info: ObjectInfo, known: Mapping[str, object]) -> bool:
    """Return whether neither the object nor its file has changed since the last fetch."""
    noted = known.get(info.key)
    return bool(info.etag) and noted == {"etag": info.etag, "file": _stamp(folder / info.key)}


def _stamp(path: Path) -> str:
    """Return a stamp that changes when the file is replaced; empty if there is no file."""
    try:
        found = path.lstat()
    except (OSError, ValueError):
        return ""
    return f"{found.st_size:x}-{found.st_mtime_ns:x}" if stat.S_ISREG(found.st_mode) else ""


def _read_record(folder: Path, uri: str) -> Mapping[str, object]:
    """Return etag and stamp of the files fetched from `uri`; nothing if the record is unusable."""
    try:
        with (folder / RECORD).open("rb") as file:
            record = parsed_object(file.read(_RECORD_BYTES + 1), _RECORD_BYTES)
    except (OSError, ValueError):
        return {}
    files = record.get("files")
    return files if record.get("from") == uri and isinstance(files, dict) else {}


def _write_record(folder: Path, scratch: Path, uri: str, here: Mapping[str, ObjectInfo]) -> None:
    files = {key: {"etag": info.etag, "file": _stamp(folder / key)} for key, info in here.items()}
    partial = scratch / RECORD
    partial.write_bytes(encoded_json({"from": uri, "files": files}))
    partial.replace(folder / RECORD)
