"""The commands: `jebm NAME …`, or `python jobs/NAME.py …` if jebm is not installed.

Each module here is one: it parses, calls the package that does the work, and prints the result. Only the
running command's module is imported, so `jebm --help` needs neither torch nor ray.
"""

import ast
import importlib
import pkgutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import jebm
from jebm.cli import run, tell
from jebm.errors import ConfigError
from jebm.plain import hint_at

_HELP = """\
usage: jebm COMMAND …

Distributed training of multi-layer generators with a joint latent-space energy-based prior.

{commands}

A first run, of two minutes, on images that come with jebm, and what it has left:

  jebm train --config smoke --cluster.engine process --cluster.workers 1
  jebm status runs/smoke
  jebm sample --checkpoint runs/smoke --count 100

jebm COMMAND --help explains a command and its options. On a Ray cluster jebm need not be installed:

  ray job submit --working-dir . -- python jobs/train.py --config jobs/configs/smoke.yaml --run.storage s3://…"""


def main() -> NoReturn:
    """Run the command named on the command line and exit with its exit code."""
    name = (sys.argv[1:2] or ["--help"])[0]
    if name in ("-h", "--help", "--version"):
        run(lambda: tell(f"jebm {jebm.__version__}" if name == "--version" else _help()))
    if name not in _names():
        run(lambda: _refuse(name))
    del sys.argv[1]
    run_command(name)


def run_command(name: str) -> NoReturn:
    """Run a command with this process's arguments and exit with its exit code."""
    sys.argv[0] = f"jebm {name}"  # the program's name in usage lines

    def started() -> int | None:
        try:
            code: int | None = importlib.import_module(_module(name)).main()
        except ModuleNotFoundError as error:
            if error.name not in ("optuna", "ray"):
                raise
            hint = "; to train without Ray: --cluster.engine process" if name == "train" else ""
            raise ConfigError(f"{error.name} is not installed; install jebm[ray]{hint}") from None
        return code

    run(started)


def _names() -> list[str]:
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def _module(name: str) -> str:
    return f"jebm.commands.{name.replace('-', '_')}"


def _help() -> str:
    """Return the help: each command with its docstring's first line, read without importing it."""
    lines = []
    for name in _names():
        spec = find_spec(_module(name))
        source = Path(spec.origin).read_text("utf-8") if spec and spec.origin else ""
        summary = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
        lines.append(f"  {name:<13}{summary}")
    return _HELP.format(commands="\n".join(lines))


def _refuse(name: str) -> NoReturn:
    raise ConfigError(f"unknown command {name}; {hint_at(name, _names())}")
