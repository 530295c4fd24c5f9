"""What `ray job submit` takes along, by Ray's own packaging, and the environment that it asks for."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes, create_package
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).parents[2]
UPLOAD_LIMIT_BYTES = 100 * 2**20

# Ray asks pathspec for a pattern style that pathspec has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")

WANTED = [
    "jobs/train.py",
    "jobs/configs/fashion_mnist.yaml",
    "jobs/data/sample.parquet",
    "platform/jebm/__init__.py",
    "platform/jebm/data/shards.py",
    "cluster/runtime-env.yaml",
    "requirements/cluster.txt",
]
UNWANTED = [
    ".env",
    ".env.production",
    "jobs/.env",
    "server.pem",
    "jobs/private.key",
    "credentials",
    "jobs/credentials.json",
    "auth_token",
    ".aws/credentials",
    ".jebm/auth_token",
    "data/train.parquet",
    "runs/first/checkpoint/manifest.json",
    ".s3/bucket/object",
    ".venv/bin/python",
    ".git/config",
    ".cache/file",
    "platform/jebm/__pycache__/config.pyc",
    "platform/jebm.egg-info/PKG-INFO",
]


def runtime_env_file() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster/runtime-env.yaml").read_text())
    return loaded


def job_runtime_env() -> dict[str, Any]:
    job = yaml.safe_load((ROOT / "cluster/kuberay/rayjob.yaml").read_text())
    loaded: dict[str, Any] = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    return loaded


def uploaded(tree: Path, package: Path, excludes: list[str]) -> set[str]:
    create_package(str(tree), package, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(package) as archive:
        return set(archive.namelist())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in [*WANTED, *UNWANTED]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


@pytest.mark.parametrize("excludes", [[], get_runtime_env_default_excludes()], ids=["bare", "ray's default"])
def test_secrets_and_data_stay_and_the_shipped_sample_goes(
    tree: Path, tmp_path: Path, excludes: list[str]
) -> None:
    (tree / ".rayignore").write_bytes((ROOT / ".rayignore").read_bytes())
    assert uploaded(tree, tmp_path / "package.zip", excludes) == {*WANTED, ".rayignore"}


def test_without_the_file_ray_uploads_secrets(tree: Path, tmp_path: Path) -> None:
    names = uploaded(tree, tmp_path / "package.zip", get_runtime_env_default_excludes())
    assert {".env", "server.pem", "credentials", ".aws/credentials"} <= names


def test_the_working_tree_as_it_is_uploads_the_sample_within_the_limit() -> None:
    excludes = [*get_runtime_env_default_excludes(), *runtime_env_file()["excludes"]]
    found: set[Path] = set()
    _dir_travel(ROOT, [_get_excludes(ROOT, excludes)], found.add, include_gitignore=True)
    files = {path for path in found if path.is_file()}
    names = {path.relative_to(ROOT).as_posix() for path in files}
    assert {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "jobs/data").rglob("*") if path.is_file()
    } <= names
    assert "cluster/runtime-env.yaml" in names
    assert not {
        name for name in names if name.startswith((".git/", ".venv/", "tests/", "docs/", "benchmarks/"))
    }
    assert not {path for path in files if path.name.startswith(".env") or path.suffix in {".pem", ".key"}}
    assert sum(path.stat().st_size for path in files) < UPLOAD_LIMIT_BYTES


@pytest.mark.parametrize("load", [runtime_env_file, job_runtime_env])
def test_ray_accepts_the_runtime_environment(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # `pip` names a file from where `ray job submit` is typed
    given = load()
    assert given.keys() <= RuntimeEnv.known_fields
    assert given["config"].keys() <= {"setup_timeout_seconds", "eager_install", "log_files"}
    parsed = RuntimeEnv(**given)
    assert "torch==2.13.0" in parsed["pip"]["packages"]
    assert parsed["env_vars"] == given["env_vars"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("env_vars", {"RAY_JOB_STOP_WAIT_TIME_S": 120}), ("excludes", "tests"), ("pip", {"package": ["torch"]})],
)
def test_a_wrong_value_is_caught(key: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((TypeError, ValueError)):
        RuntimeEnv(**(runtime_env_file() | {key: value}))


@pytest.mark.parametrize("key", sorted(runtime_env_file()))
def test_a_misspelt_key_is_caught(key: str) -> None:
    given = runtime_env_file()
    given[f"{key}_typo"] = given.pop(key)
    assert not given.keys() <= RuntimeEnv.known_fields


def test_both_environments_set_the_same_variables() -> None:
    assert runtime_env_file()["env_vars"] == job_runtime_env()["env_vars"]


@pytest.mark.parametrize("load", [runtime_env_file, job_runtime_env])
def test_pythonpath_is_left_to_the_job(load: Any) -> None:
    # The same variable from both sides: "Failed to merge the Job's runtime env".
    assert "PYTHONPATH" not in load()["env_vars"]
