"""The rules of the house, read from the source.

Who may import whom stands in setup.cfg, for import-linter; what nobody may import or call, in ruff.toml;
sizes, in scripts/measure-house. scripts/check runs all three; here each is broken on purpose, to see that it
would be found. The rest is tested here: what a module may do on import, and what it exports.
"""

import ast
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(sys.executable).parent


def unsafe_loads(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield every torch.load that may run what is in the file."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load":
            values = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if values.get("weights_only") != "True":
                yield call.lineno, "torch.load without weights_only=True"


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
    """Return `file:line: what is wrong` for every breach of this file's rules under a package folder."""
    found = []
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        breaches = [*side_effects(tree.body), *unsafe_loads(tree)]
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
    ("train/a.py", "print('hello')", "does something on import"),
    ("train/a.py", "import torch\ntorch.set_num_threads(1)", "does something on import"),
    ("train/a.py", "import os\nos.environ['A'] = '1'", "writes into another object on import"),
    ("train/a.py", "try:\n    f()\nexcept Exception:\n    pass", "does something on import"),
    ("train/a.py", "for i in range(3):\n    pass", "For on import"),
    ("store/a.py", "def f(x):\n    return torch.load(x)", "without weights_only"),
    ("store/a.py", "def f(x):\n    return torch.load(x, weights_only=False)", "without weights_only"),
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
    plant(tmp_path, "train/a.py", "import jebm\nimport boto3\nX = len('a')")
    package = plant(tmp_path, "evaluate/a.py", "if __name__ == '__main__':\n    print(1)")
    assert violations(package) == []


IMPORTS = {
    "core/a1.py": "from jebm.store import storage",
    "core/a2.py": "from jebm import parser",
    "core/a3.py": "import numpy as np",
    "core/a4.py": "def f():\n    import yaml",
    "core/a5.py": "from ..train.loop import fit",
    "config/a6.py": "from jebm.rng import generator",
    "data/a7.py": "from jebm.core.model import x",
    "store/a8.py": "from jebm.data.manifest import x",
    "train/a9.py": "from jebm.evaluate.suite import x",
    "train/b1.py": "def f():\n    from jebm.on_ray import x",
    "train/b2.py": "import ray.train",
    "sweep/b3.py": "import ray.tune",
    "parser/b4.py": "from jebm.train.loop import fit",
    "evaluate/b5.py": "from jebm.native.chain import x",
    "commands/b6.py": "import ray",
    "report/b7.py": "from jebm.cli import tell",
    "attic/__init__.py": "",
}
"""A breach of setup.cfg's contracts each; the last is a room that no contract knows."""


def test_every_forbidden_import_is_seen(tmp_path):
    shutil.copytree(ROOT / "platform" / "jebm", tmp_path / "jebm")
    for file, source in IMPORTS.items():
        (tmp_path / "jebm" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "jebm" / file).write_text(source, encoding="utf-8")
    linted = subprocess.run(
        [TOOLS / "lint-imports", ROOT / "setup.cfg", "--no-cache", "--no-logo"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert linted.returncode == 1
    for file in IMPORTS:
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        assert f"jebm.{module} -> " in linted.stdout or f"- jebm.{module}\n" in linted.stdout, linted.stdout


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import marshal",
        "from shelve import open",
        "import torch\n\ntorch.load('x', weights_only=True)",
        "from torch import load",
        "import torch.distributed as dist\n\ndist.init_process_group('gloo')",
        "import torch.distributed as dist\n\ndist.destroy_process_group()",
    ],
)
def test_what_is_banned_is_seen(source):
    checked = subprocess.run(
        [TOOLS / "ruff", "check", "--stdin-filename", "platform/jebm/store/a.py", "-"],
        cwd=ROOT,
        input=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "TID251" in checked.stdout, checked.stdout


def test_sizes_are_within_their_limits_and_a_long_file_is_seen(tmp_path):
    measure = [sys.executable, ROOT / "scripts" / "measure-house", "--over"]
    assert subprocess.run(measure, capture_output=True, text=True, check=False).stdout == ""
    body = "\n".join(f"    x{i} = {i}" for i in range(50))
    plant(tmp_path, "core/a.py", f"def f(a, b, c, d, e, f, g, h):\n{body}\n" + "\n" * 300)
    over = subprocess.run(
        [*measure, "--root", tmp_path], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    assert over == [
        "core/a.py: 354 lines, most are 350",
        "core/a.py: f has 51 lines, most are 50",
        "core/a.py: f has 8 parameters, most are 7",
    ]


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


def test_no_two_test_files_have_one_name():
    """pytest imports them by name: of two, it would collect one."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted({name for name in names if names.count(name) > 1}) == []
