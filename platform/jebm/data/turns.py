"""One process of a node decodes a data set; the others wait until it has."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from jebm.untrusted import escaped

__all__ = ["sole_decoder"]

_LOG = logging.getLogger("jebm.data")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_HOLDER_BYTES = 200
_LOOK_SECONDS = 0.1


@contextlib.contextmanager
def sole_decoder(
    directory: Path, name: str, title: str, go_on: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Wait until no other process decodes `name`; yield what the paths of unfinished files begin with.

    The system frees the lock of a process that dies. The next one gets the same path, and so replaces what
    the dead one has left. On a file system without locks nobody waits, and each gets a path of its own.
    `go_on` is called again and again while it waits, and ends that by raising.

    Raises:
        OSError: the directory cannot be written.
    """
    stem = directory / f".decoding-{name}"
    lock = stem.with_suffix(".lock")
    line: str | None = f"decodes {title} into {directory}"
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _locked(descriptor, line, go_on):
                break
            if _is_file(lock, descriptor):
                holder = f"process {os.getpid()} on {socket.gethostname()}".encode()
                os.pwrite(descriptor, holder.ljust(_HOLDER_BYTES), 0)
                try:
                    yield stem
                finally:
                    lock.unlink(missing_ok=True)
                return
            line = None  # the file has been deleted by the holder we waited for, and nothing new is to say
        finally:
            os.close(descriptor)
    lock.unlink(missing_ok=True)
    yield stem.with_name(f"{stem.name}-{uuid.uuid4().hex}")


def _locked(descriptor: int, line: str | None, go_on: Callable[[], None]) -> bool:
    """Lock the file, if need be after a log line on what its holder does; return False without locks."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if line is not None:
                _LOG.info("waiting for %s, which %s", _holder(descriptor), line)
                line = None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        go_on()
        time.sleep(_LOOK_SECONDS)


def _holder(descriptor: int) -> str:
    """Return the process that holds the lock, as it says a moment after it has locked the file."""
    for _ in range(100):
        if holder := os.pread(descriptor, _HOLDER_BYTES, 0):
            return escaped(holder.decode("utf-8", "replace").strip())
        time.sleep(0.01)
    return "another process"


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
