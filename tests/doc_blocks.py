"""The fenced blocks of the documentation: found, checked without running them, and run page by page.

A comment on the line above a fence, which no reader sees, says why a block is not run:

    <!-- not run: needs AWS -->
"""

import ast
import importlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from jsonargparse import ArgumentParser

from jebm.commands import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/tutorial.md")  # first; the others, on what these leave, in alphabetical order
OTHERS = ("CONTRIBUTING.md", "cluster/README.md")
RUN = ("bash", "console", "python")
"""Languages that are run; of a console only the lines that begin with `$`."""
SHOWN = ("json", "text", "yaml")
TINY = {
    "model.latent_dims": [2, 2, 10],
    "generator.channels": [2, 2],
    "generator.width": 8,
    "inference.channels": [2, 2],
    "inference.width": 8,
    "energy.width": 8,
    "langevin.steps": 2,
    "evaluation.samples": 100,
}
"""Config keys of a model that trains in seconds, for blocks that would take minutes."""

_FENCE = re.compile(r"^```(.*)$")
_REASON = re.compile(r"^<!-- not run: (.+) -->$")
_JOB = re.compile(r"jobs/(\w+)\.py")
_FILE = re.compile(r"(scripts|jobs|benchmarks|experiments)/[\w-]+(\.py)?")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    """Of the opening fence, from 1."""
    language: str
    text: str
    reason: str | None
    """Why it is not run; None for one that is."""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def script(self) -> str:
        """Return what a shell or Python is given."""
        if self.language != "console":
            return self.text
        return "".join(line[2:] + "\n" for line in self.text.splitlines() if line.startswith("$ "))


def pages() -> list[str]:
    """Return the pages with blocks, in the order in which they are run."""
    docs = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
    return [*PAGES, *(name for name in docs if name not in PAGES), *OTHERS]


def blocks_of(page: str, text: str) -> list[Block]:
    """Return the blocks of a page's text."""
    found: list[Block] = []
    lines = text.splitlines()
    start: int | None = None
    for index, line in enumerate(lines):
        fence = _FENCE.match(line.strip())
        if fence and start is None:
            start, language = index, fence[1]
        elif fence and start is not None:
            above = _REASON.match(lines[start - 1]) if start else None
            body = "".join(f"{inside}\n" for inside in lines[start + 1 : index])
            found.append(Block(page, start + 1, language, body, above and above[1]))
            start = None
    return found


def faults(page: str, text: str) -> Iterator[str]:
    """Yield what is wrong with a page's blocks as far as can be seen without running them, a line each."""
    blocks = blocks_of(page, text)
    marks = [line for line in text.splitlines() if line.lstrip().startswith("<!-- not")]
    if len(marks) != sum(block.reason is not None for block in blocks):
        yield f"{page}: of {marks}, one is not `<!-- not run: WHY -->` on the line above a fence"
    for block in blocks:
        yield from _faults(block)


def _faults(block: Block) -> Iterator[str]:
    if block.language not in RUN + SHOWN:
        yield f"{block.place}: ```{block.language}: not one of {', '.join(RUN + SHOWN)}"
    elif block.language == "python":
        yield from (f"{block.place}: {fault}" for fault in _python_faults(block.script))
    elif block.language in RUN:
        for command in _commands(block.script):
            for fault in _command_faults(command):
                yield f"{block.place}: {shlex.join(command)}: {fault}"


def _python_faults(text: str) -> Iterator[str]:
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        yield str(error)
        return
    for node in ast.walk(tree):
        for name in [alias.name for alias in node.names] if isinstance(node, ast.Import) else []:
            if find_spec(name) is None:
                yield f"no module {name}"
        if isinstance(node, ast.ImportFrom) and node.module:
            if find_spec(node.module) is None:
                yield f"no module {node.module}"
                continue
            module = importlib.import_module(node.module)
            absent = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            yield from (f"{node.module} has no {name}" for name in absent)


def _commands(script: str) -> Iterator[list[str]]:
    """Yield the words of each command."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;<>"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def _command_faults(words: list[str]) -> Iterator[str]:
    """Yield scripts that do not exist, and what the parser of a jebm command says."""
    for word in words:
        if _FILE.fullmatch(word) and not (ROOT / word).is_file():
            yield f"no file {word}"
    for index, word in enumerate(words):
        job = _JOB.fullmatch(word)
        if job or (word == "jebm" and (index == 0 or words[index - 1] == "-m")):
            name = [job[1].replace("_", "-")] if job else []
            fault = parsed([*name, *words[index + 1 :]])
            if fault:
                yield fault
            return


def parsed(words: list[str]) -> str | None:
    """Return what is wrong with the words of a `jebm` command, as its own parser says; None if they are fine.

    A config file that a page's reader would have written is taken as `smoke`; a class of theirs is not there.
    """
    if any(word.endswith(".help") for word in words):
        return None
    words = [
        "smoke" if before == "--config" and word.endswith(".yaml") and not (ROOT / word).is_file() else word
        for before, word in zip(["", *words], words, strict=False)
    ]
    # Each command checks all words itself and then calls jsonargparse: there we stop it.
    with (
        patch.object(sys, "argv", ["jebm", *words]),
        patch.object(ArgumentParser, "parse_args", _stop),
        redirect_stderr(io.StringIO()) as refused,
        redirect_stdout(io.StringIO()),
    ):
        try:
            main()
        except (_Parsed, SystemExit):
            return refused.getvalue().strip() or None


class _Parsed(BaseException):
    """A command line has passed all checks."""


def _stop(*_: object, **__: object) -> None:
    raise _Parsed


def run_blocks(blocks: list[Block], folder: Path, environment: dict[str, str], seconds: float) -> str:
    """Run the blocks of one page in one shell in a folder; return its output, with each block's time.

    A Python block sees what the page's earlier ones have defined: these run again with it.

    Raises:
        AssertionError: a block failed, which the message names, or they took longer than `seconds`.
    """
    script, python = ["set -euo pipefail"], ""
    for number, block in enumerate(blocks):
        script.append(f'echo "== {block.place}"; SECONDS=0')
        if block.language == "python":
            python += block.script
            (folder / f".block-{number}.py").write_text(python, encoding="utf-8")
            script.append(f"{shlex.quote(sys.executable)} .block-{number}.py")
        else:
            script.append(block.script)
        script.append(f'echo "== {block.place} took $SECONDS s"')
    (folder / ".page.sh").write_text("\n".join(script), encoding="utf-8")
    with (folder / ".page.log").open("w+", encoding="utf-8", errors="replace") as log:
        shell = subprocess.Popen(
            ["bash", ".page.sh"],
            cwd=folder,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: object = shell.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"none, after {seconds:.0f} s"
        finally:
            if shell.poll() is None:  # with all that it has started
                os.killpg(shell.pid, signal.SIGKILL)
                shell.wait()
        log.seek(0)
        output = log.read()
    last = output.rpartition("== ")[2].partition("\n")[0]
    assert code == 0, f"{last} failed with exit code {code}:\n{output[-3000:]}"
    return output


def shorten(path: Path, keys: dict[str, Any]) -> None:
    """Change dotted keys of a config or search file."""
    values = yaml.safe_load(path.read_text("utf-8"))
    for key, value in keys.items():
        section, _, name = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = value
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
