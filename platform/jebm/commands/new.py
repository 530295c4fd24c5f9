"""Write the skeleton of a part of your own: a generator, inference net, energy or likelihood, and its test.

  jebm new energy mine.py          then:  pytest test_mine.py
                                          jebm train --config smoke --energy.class_path mine.MyEnergy

The skeleton works as it is. The test checks what training relies on (jebm.testing); see docs/own-model.md.
"""

import keyword
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Literal

from jebm.cli import tell
from jebm.errors import ConfigError
from jebm.parser import job_parser, parse

__all__ = ["main"]


def main() -> None:
    """Write both files and print what to do with them."""
    parser = job_parser(__doc__ or "")
    kinds = Literal["generator", "inference", "energy", "likelihood"]
    parser.add_argument("kind", type=kinds, help="which part")
    parser.add_argument("file", type=Path, help="where to, such as mine.py")
    arguments = parse(parser)
    kind, file = arguments.kind, arguments.file
    _check_name(file)
    test = file.with_name(f"test_{file.name}")
    # The skeleton, and its test.
    name = f"My{kind.capitalize()}"
    skeletons = files("jebm.testing") / "skeletons"
    source = (skeletons / f"{kind}.py.txt").read_text("utf-8")
    its_test = (skeletons / "test.py.txt").read_text("utf-8")
    made: list[Path] = []
    try:
        _check(file, test)
        for path, text in ((file, source), (test, its_test.format(name=name, module=file.stem, kind=kind))):
            with path.open("x", encoding="utf-8") as stream:
                made.append(path)
                stream.write(text)
    except OSError as error:
        for path in made:  # or the same command again would find it there
            path.unlink()
        reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        raise ConfigError(f"file: {file} cannot be written ({reason}); name another place") from error
    tell(f"wrote {file} with {name}, and {test}; next:")
    if file.parent != Path():  # a class is found in the working directory
        tell(f"  cd {quote(str(file.parent))}")
    tell(f"  pytest {test.name}\n  jebm train --config smoke --{kind}.class_path {file.stem}.{name}")
    tell(f"  jebm train --{kind}.help {file.stem}.{name}")


def _check_name(file: Path) -> None:
    """Raise `ConfigError` unless a file of this name can be imported."""
    if file.suffix != ".py" or not file.stem.isidentifier() or keyword.iskeyword(file.stem):
        raise ConfigError(f"file: {file} must be named as a Python module, such as mine.py")


def _check(file: Path, test: Path) -> None:
    """Raise `ConfigError` unless both files can be written, and no other module has the first one's name."""
    for path in (file, test):
        if path.exists():
            raise ConfigError(f"file: {path} exists; name another one")
    if not file.parent.is_dir():
        raise ConfigError(f"file: there is no folder {file.parent}")
    try:
        is_taken = find_spec(file.stem) is not None
    except ValueError:  # by a module without a file, as __main__ may be
        is_taken = True
    if is_taken:
        raise ConfigError(f"file: there is a module {file.stem} already; name another one")
