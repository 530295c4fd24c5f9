"""Recognise splits (train, test and the like) in the names of folders, files and arrays.

A source with parts returns the requested one, or an error that names those it has. It never returns the same
images under two names.
"""

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jebm.errors import DataError

__all__ = ["canonical", "chosen_part", "folder_parts", "name_parts", "named_split", "without_split"]

_SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "t10k"),
    "eval": ("eval", "evaluation"),
    "extra": ("extra",),
    "unlabeled": ("unlabeled", "unlabelled"),
}
_MEANING = {spelling: meaning for meaning, spellings in _SPELLINGS.items() for spelling in spellings}
_WORD = re.compile(
    # As a separate word, or joined with one of a few others: xtrain, trainset, testA, val2017.
    rf"(?<![a-z])[xy]?({'|'.join(sorted(_MEANING, key=len, reverse=True))})"
    r"(?:set|data|images?|imgs?|labels?|[abxy])?(?![a-z])"
)


def canonical(split: str) -> str:
    """Return a split's canonical name: `val` for validation, valid and dev; other words unchanged."""
    return _MEANING.get(split.lower(), split)


def _meaning(name: str) -> str | None:
    """Return the split that a name mentions; None if it mentions none or several."""
    found = {_MEANING[word] for word in _WORD.findall(name.lower())}
    return found.pop() if len(found) == 1 else None


def named_split(asked: str | None, path: Path) -> tuple[str, tuple[str, ...]]:
    """Return the split's name for a source without parts, from the request or its path, and remarks.

    Raises DataError if its name mentions another split than the requested one.
    """
    name = path.name if path.name not in {"", ".."} else path.resolve().name
    spoken = _meaning(name)
    if asked is None:
        return spoken or "train", ()
    if spoken is not None and canonical(asked) != spoken and canonical(asked) in _SPELLINGS:
        raise DataError(
            f"{path}: is split {spoken} by its name, not {asked}; give that of {asked}, or leave split out"
        )
    remark = () if spoken else (f"split {asked} is only a name here: the source does not say what it is",)
    return asked, remark


def without_split(name: str) -> str:
    """Return a name in lower case without its split word: `y` for ytrain, `_images` for Test_images."""
    return _WORD.sub(lambda match: match[0].replace(match[1], ""), name.lower())


def name_parts(names: Iterable[str]) -> dict[str, str]:
    """Return the part that each name (of an array or file) mentions, for those that mention one."""
    return {name: part for name in names if (part := _meaning(name)) is not None}


def folder_parts(names: Sequence[str]) -> dict[str, tuple[str | None, str]]:
    """Return each file-holding folder's part, and its path without the part's name.

    Folders are parts if there are several, as {train, test} or {seg_train, seg_test}, or if there is only
    one, named train. A class named train among {bus, car, train} is not a part.
    """
    folders = {posixpath.dirname(name) for name in names}
    below: dict[str, set[str]] = defaultdict(set)
    for folder in folders:
        for depth, step in enumerate(_steps(folder)):
            below["/".join(_steps(folder)[:depth])].add(step)
    several = {above: _several_parts(siblings) for above, siblings in below.items()}
    only = {above: siblings for above, siblings in below.items() if _is_only_part(siblings)}
    return {
        folder: _part_of(folder, several) or _part_of(folder, only) or (None, folder) for folder in folders
    }


def _steps(folder: str) -> list[str]:
    return folder.split("/") if folder else []


def _part_of(folder: str, parts: Mapping[str, set[str]]) -> tuple[str, str] | None:
    """Return the topmost part that contains a folder, and the folder's path without it."""
    steps = _steps(folder)
    for depth, step in enumerate(steps):
        if step in parts.get("/".join(steps[:depth]), ()):
            return step, "/".join(steps[:depth] + steps[depth + 1 :])
    return None


def _several_parts(siblings: set[str]) -> set[str]:
    """Return the names that mention splits, if at least two differ only in that word."""
    meanings = name_parts(siblings)
    alike: dict[str, set[str]] = defaultdict(set)
    for name, meaning in meanings.items():
        alike[_pattern(name)].add(meaning)
    return set(meanings) if any(len(family) > 1 for family in alike.values()) else set()


def _is_only_part(siblings: set[str]) -> bool:
    return len(siblings) == 1 and all(_meaning(name) and _pattern(name) == "*" for name in siblings)


def _pattern(name: str) -> str:
    """Return a name with its split word replaced by a star, and without numbers."""
    return re.sub(r"\d+", "", _WORD.sub(lambda match: match[0].replace(match[1], "*"), name.lower()))


def chosen_part(asked: str | None, parts: Mapping[str, int], path: object, *, default: bool = False) -> str:
    """Return the part to take, one of `parts` (each with its number of images or files).

    `default`: without a request, take the train part.
    Raises DataError, naming the parts, if the request matches none or several.
    """
    names = f"the part{'' if len(parts) == 1 else 's'} {', '.join(parts)}"
    wanted = asked if asked is not None else "train" if default else None
    if wanted is None:
        if len(parts) == 1:
            return next(iter(parts))
        raise DataError(f"{path}: has {names}; choose one of them with split")
    same = [part for part in parts if part.lower() == wanted.lower()]
    alike = same or [part for part in parts if canonical(_meaning(part) or part) == canonical(wanted)]
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise DataError(f"{path}: {' and '.join(alike)} both mean split {wanted!r}; give one of these names")
    if asked is None and len(parts) == 1:
        return next(iter(parts))
    raise DataError(f"{path}: no part of split {wanted!r} in it; it has {names}")
