"""Paths that depend on the user and the installation: `~`, this user's cache, files shipped with jebm.

A container may run under an unknown user id: no HOME, no passwd entry, or an unwritable home. All code that
needs the home folder asks here.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cache_folder", "expanded", "shipped"]

_PACKAGE = Path(__file__).parent


def expanded(path: str | Path) -> Path:
    """Return the path with a leading `~` or `~user` replaced by that home folder.

    Raises ValueError, in one line, if that home is unknown or the text cannot be a path.
    """
    text = str(path)
    if "\0" in text:
        raise ValueError(f"{text!r} cannot be a path: it holds a NUL character")
    if not text.startswith("~"):
        return Path(path)
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = text.partition("/")[0].removeprefix("~")
        whose = f"{user!r} has no home folder here" if user else f"user id {os.getuid()} has no home folder"
        remedy = "write the whole path" if user else "set HOME, or write the whole path"
        raise ValueError(f"{text}: {whose}; {remedy}") from None


def shipped(path: str | Path, folder: str = "") -> Path:
    """Return the path, or, if it does not exist, the file that jebm ships under this name.

    For example `jobs/configs/smoke.yaml` from any working directory, or just `smoke` with `folder` "configs";
    without `folder` only data sets, so that nothing else is ever written into the installation. In a wheel
    such files are in jebm/shipped/, in a checkout in jobs/.
    """
    path = Path(path)
    there = os.path.lexists(path) and not (folder and path.is_dir())  # a run's folder may be named smoke
    if there or path.is_absolute() or ".." in path.parts:
        return path
    root = next(filter(Path.is_dir, (_PACKAGE / "shipped", _PACKAGE.parents[1] / "jobs")), _PACKAGE)
    name = root / folder / f"{path}.yaml" if folder and len(path.parts) == 1 else path
    if path.parts[:1] == ("jobs",):
        name = root.joinpath(*path.parts[1:])
    return name if os.path.lexists(name if folder else name / "dataset.json") else path


def cache_folder() -> Path:
    """Return this user's cache folder; it exists, belongs to the user and is writable.

    It is $XDG_CACHE_HOME/jebm or ~/.cache/jebm; without a writable home, one in the temporary folder, named
    by the user id. Its files may be loaded as code, so a folder owned by another user is skipped.

    Raises OSError if neither can be used; its message names both.
    """
    tried = []
    for folder in _candidates():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            owners = {folder.lstat().st_uid, folder.stat().st_uid}
        except OSError as error:
            tried.append(f"{folder}: {error.strerror}")
            continue
        if owners != {os.getuid()}:
            tried.append(f"{folder}: belongs to another user")
        elif not os.access(folder, os.W_OK | os.X_OK):
            tried.append(f"{folder}: cannot be written")
        else:
            return folder
    raise OSError(f"no folder for a cache ({'; '.join(tried)})")


def _candidates() -> Iterator[Path]:
    named = Path(os.environ.get("XDG_CACHE_HOME") or "")
    if named.is_absolute():  # as the XDG specification requires
        yield named / "jebm"
    else:
        with contextlib.suppress(RuntimeError):  # no HOME and no passwd entry
            yield Path.home() / ".cache" / "jebm"
    yield Path(tempfile.gettempdir(), f"jebm-{os.getuid()}")
