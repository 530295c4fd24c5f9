"""The rules of the house, read from the source: who may import whom, and what a module may do on import.

    {errors, paths, untrusted} -> config -> rng -> {core, store -> data} -> report
        -> {train, evaluate, sweep} -> {campaign, on_ray} -> commands

Left to right only; rooms in one brace do not know each other. `native` (compiled kernels) knows only paths,
and only core knows it. `parser` and `cli` stand beside this line: they know errors and config, and only
train, evaluate and sweep (parser alone), campaign, on_ray and the commands know them.
"""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

_BASE = {"jebm", "errors", "paths", "untrusted"}  # `import jebm` is for the version
KNOWS = {
    "errors": set(),
    "paths": set(),
    "untrusted": set(),
    "config": {"errors"},
    "rng": {"errors", "config"},
    "native": {"paths"},
    "core": {"errors", "config", "rng", "native"},
    "data": _BASE | {"config", "rng", "store"},
    "store": _BASE | {"config", "rng"},
    "report": _BASE | {"store"},
    "train": _BASE | {"config", "rng", "core", "data", "store", "parser", "cli"},
    "evaluate": _BASE | {"config", "rng", "core", "data", "store", "report", "parser"},
    "sweep": _BASE | {"config", "rng", "store", "report", "parser"},
    "campaign": _BASE
    | {"config", "rng", "core", "data", "store", "report", "train", "evaluate", "parser", "cli"},
    "on_ray": _BASE
    | {"config", "rng", "core", "data", "store", "report", "train", "evaluate", "sweep", "parser", "cli"},
    "parser": _BASE | {"config"},
    "cli": _BASE | {"config"},
    "__main__": {"commands"},
    "jebm": set(),
}
KNOWS["commands"] = set(KNOWS) - {"__main__"}
OUTSIDE = {
    "errors": set(),
    "paths": set(),
    "untrusted": set(),
    "config": set(),
    "rng": {"torch"},
    "native": {"torch", "triton"},
    "core": {"torch"},
}
"""What else a room may import beside the standard library; a room that is not named here: all but ray."""

UNSAFE = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
WEIGHTS_ALLOWED = "evaluate/features/"
"""Reads the weights of a published net, a file known by its sha256, only by torch.load(weights_only=True)."""


def imports(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted module) for every import, inside functions too; jebm's own to depth two."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "jebm" else [base]
        elif isinstance(node, ast.Call):
            function = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            argument = node.args[0] if node.args else None
            if function in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                names = [str(argument.value)]
        for name in names:
            yield node.lineno, name


def import_violations(tree: ast.Module, file: str) -> Iterator[tuple[int, str]]:
    parts = file.removesuffix(".py").removesuffix("/__init__").split("/")
    room = "jebm" if parts == ["__init__"] else parts[0]
    module = ".".join(["jebm", *file.removesuffix(".py").split("/")])
    if room not in KNOWS:
        yield 1, f"{room} is not a room of the house"
        return
    for line, name in imports(tree, module):
        top, _, rest = name.partition(".")
        if top == "jebm":
            other = rest.split(".")[0] if rest.split(".")[0] in KNOWS else "jebm"
            if rest and other == "jebm" and not rest.startswith("__"):
                yield line, f"{name} is not a room of the house"
            elif other not in (room, *KNOWS[room]):
                yield line, f"{room} must not know {name}"
        elif top == "ray":
            if room != "on_ray":
                yield line, "only on_ray imports ray"
        elif top not in sys.stdlib_module_names and top not in OUTSIDE.get(room, {top}):
            yield line, f"{room} must not import {top}"
        if top in UNSAFE:
            yield line, f"{top} runs what is in a file"
        if name == "torch":
            yield from torch_loads(tree, file)


def torch_loads(tree: ast.Module, file: str) -> Iterator[tuple[int, str]]:
    """Yield every torch.load, but for calls in WEIGHTS_ALLOWED that say weights_only=True."""
    safe = {
        node.func
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and file.startswith(WEIGHTS_ALLOWED)
        and any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
    }
    for node in ast.walk(tree):
        called = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load" and node not in safe
        imported = (
            isinstance(node, ast.ImportFrom)
            and node.module == "torch"
            and "load" in {alias.name for alias in node.names}
        )
        if called or imported:
            yield node.lineno, f"torch.load is for {WEIGHTS_ALLOWED} alone"


def is_name(target: ast.expr) -> bool:
    return isinstance(target, ast.Name) or (isinstance(target, ast.Tuple) and all(map(is_name, target.elts)))


def side_effects(body: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """Yield what happens on import beside binding names: bare calls, loops, writes into other objects."""
    for node in body:
        if isinstance(node, ast.If):
            if ast.unparse(node.test) != "__name__ == '__main__'":
                yield from side_effects(node.body)
            yield from side_effects(node.orelse)
        elif isinstance(node, ast.Try):
            for part in (
                node.body,
                *[handler.body for handler in node.handlers],
                node.orelse,
                node.finalbody,
            ):
                yield from side_effects(part)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if not all(map(is_name, targets)):
                yield node.lineno, "writes into another object on import"
        elif isinstance(node, ast.Expr):
            if not (isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)):
                yield node.lineno, "does something on import"
        elif not isinstance(
            node,
            ast.Import
            | ast.ImportFrom
            | ast.FunctionDef
            | ast.AsyncFunctionDef
            | ast.ClassDef
            | ast.Pass
            | ast.Raise,
        ):
            yield node.lineno, f"{type(node).__name__} on import"


def export_order(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions, each by name: the order that ruff (RUF022) keeps."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def export_violations(tree: ast.Module) -> Iterator[tuple[int, str]]:
    defined: set[str] = set()
    exported: ast.Assign | None = None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {alias.asname or alias.name for alias in node.names}
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
            if isinstance(target, ast.Name):
                defined.add(target.id)
                if target.id == "__all__" and isinstance(node, ast.Assign):
                    exported = node
    if exported is None:
        yield 1, "has no __all__"
        return
    names = ast.literal_eval(exported.value)
    if list(names) != sorted(set(names), key=export_order):
        yield exported.lineno, "__all__ is not sorted"
    for name in names:
        if name not in defined:
            yield exported.lineno, f"__all__ names {name}, which is not there"


def violations(package: Path) -> list[str]:
    """Return `file:line: what is wrong` for every breach of the rules under a package folder."""
    found = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        breaches = [*import_violations(tree, file), *side_effects(tree.body)]
        if path.name != "__init__.py":
            breaches += export_violations(tree)
        found += [f"{file}:{line}: {what}" for line, what in breaches]
    if (package.parent / "__init__.py").exists():
        found.append("platform/__init__.py would hide the standard library's platform")
    return found


def test_the_house_keeps_its_rules():
    package = ROOT / "platform" / "jebm"
    assert len(list(package.rglob("*.py"))) > 20
    assert violations(package) == []


def test_the_standard_library_keeps_its_platform():
    answer = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == sys.platform.capitalize()


PLANTED = [
    ("core/a.py", "import jebm.data.loader", "core must not know jebm.data.loader"),
    ("core/a.py", "from jebm.store import storage", "core must not know jebm.store"),
    ("core/a.py", "from jebm import parser", "core must not know jebm.parser"),
    ("core/a.py", "from ..train.update import step", "core must not know jebm.train.update"),
    ("core/a.py", "import numpy as np", "core must not import numpy"),
    ("core/a.py", "def f():\n    import yaml", "core must not import yaml"),
    ("core/a.py", "import ray", "only on_ray imports ray"),
    ("config.py", "import torch", "config must not import torch"),
    ("config.py", "from jebm.rng import generator", "config must not know jebm.rng"),
    ("errors.py", "import jebm.config", "errors must not know jebm.config"),
    ("rng.py", "from jebm.core import model", "rng must not know jebm.core"),
    ("store/a.py", "from jebm.data.manifest import x", "store must not know jebm.data.manifest"),
    ("data/__init__.py", "from jebm.core.model import x", "data must not know jebm.core.model"),
    ("store/a.py", "from jebm.core.model import x", "store must not know jebm.core.model"),
    ("store/a.py", "from jebm.parser import x", "store must not know jebm.parser"),
    ("train/a.py", "from jebm.evaluate.x import y", "train must not know jebm.evaluate.x"),
    ("evaluate/a.py", "from jebm.train.x import y", "evaluate must not know jebm.train.x"),
    ("evaluate/a.py", "from jebm.cli import run", "evaluate must not know jebm.cli"),
    ("sweep/a.py", "from jebm.train.loop import fit", "sweep must not know jebm.train.loop"),
    ("sweep/a.py", "import ray.tune", "only on_ray imports ray"),
    ("evaluate/a.py", "import jebm.sweep.study", "evaluate must not know jebm.sweep.study"),
    ("train/a.py", "def f():\n    from jebm.on_ray import x", "train must not know jebm.on_ray"),
    ("train/a.py", "import ray.train", "only on_ray imports ray"),
    ("train/a.py", "import importlib\nX = importlib.import_module('ray.tune')", "only on_ray imports ray"),
    ("parser.py", "from jebm.train.loop import fit", "parser must not know jebm.train.loop"),
    ("attic/a.py", "X = 1", "attic is not a room of the house"),
    ("train/a.py", "import jebm.attic", "jebm.attic is not a room of the house"),
    ("store/a.py", "import pickle", "pickle runs what is in a file"),
    ("store/a.py", "import torch\n\ndef f(x):\n    return torch.load(x)", "torch.load is for"),
    ("store/a.py", "import torch\n\ndef f(x):\n    torch.load(x, weights_only=True)", "torch.load is for"),
    ("evaluate/features/a.py", "import torch\n\ndef f(x):\n    return torch.load(x)", "torch.load is for"),
    (
        "evaluate/features/a.py",
        "import torch\n\ndef f(x):\n    return torch.load(x, weights_only=False)",
        "torch.load is for",
    ),
    ("train/a.py", "print('hello')", "does something on import"),
    ("train/a.py", "import torch\ntorch.set_num_threads(1)", "does something on import"),
    ("train/a.py", "import os\nos.environ['A'] = '1'", "writes into another object on import"),
    ("train/a.py", "try:\n    f()\nexcept Exception:\n    pass", "does something on import"),
    ("train/a.py", "for i in range(3):\n    pass", "For on import"),
]


def plant(root: Path, file: str, source: str) -> Path:
    path = root / "platform" / "jebm" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{source}\n\n__all__ = []\n", encoding="utf-8")
    return root / "platform" / "jebm"


@pytest.mark.parametrize(("file", "source", "complaint"), PLANTED)
def test_a_breach_is_seen(tmp_path, file, source, complaint):
    found = violations(plant(tmp_path, file, source))
    assert len(found) == 1, found
    assert found[0].startswith(f"{file}:")
    assert complaint in found[0]


def test_what_is_allowed_passes(tmp_path):
    plant(
        tmp_path, "core/a.py", "import math\nimport torch\nfrom jebm.rng import x\nfrom jebm.core.b import y"
    )
    weights = "import torch\n\ndef f(x):\n    return torch.load(x, weights_only=True)"
    plant(tmp_path, "evaluate/features/a.py", weights)
    plant(tmp_path, "train/a.py", "import jebm\nimport boto3\nfrom jebm.store.storage import x\nX = len('a')")
    plant(tmp_path, "evaluate/a.py", "from jebm.core import model\nif __name__ == '__main__':\n    print(1)")
    package = plant(
        tmp_path, "on_ray/a.py", "import ray\nfrom jebm.train.loop import fit\nimport jebm.parser"
    )
    assert violations(package) == []


@pytest.mark.parametrize(
    ("exports", "complaint"),
    [
        ("", "has no __all__"),
        ("__all__ = ['b', 'a']", "__all__ is not sorted"),
        ("__all__ = ['a', 'B']", "__all__ is not sorted"),
        ("__all__ = ['a', 'a']", "__all__ is not sorted"),
        ("__all__ = ['a', 'c']", "__all__ names c"),
    ],
)
def test_careless_exports_are_seen(tmp_path, exports, complaint):
    path = tmp_path / "jebm" / "train" / "x.py"
    path.parent.mkdir(parents=True)
    source = f"""
    {exports}
    a = 1
    class B: ...
    def b(): ...
    """
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    assert [complaint in found for found in violations(tmp_path / "jebm")] == [True]


def test_an_init_beside_the_package_is_seen(tmp_path):
    package = plant(tmp_path, "train/a.py", "X = 1")
    (package.parent / "__init__.py").touch()
    assert ["platform/__init__.py" in found for found in violations(package)] == [True]
