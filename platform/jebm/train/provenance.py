"""The software that a result was made with."""

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import jebm
from jebm.config import Config
from jebm.core.by_class import named_modules, origins

__all__ = ["provenance"]

_SOURCES = (".py", ".c", ".h")
_PACKAGES = ("torch", "ray", "numpy", "pyarrow", "boto3")


def provenance(config: Config | None = None) -> dict[str, str]:
    """Return versions, the hash of the package's source, and the git revision (or "unknown").

    With a run's own config, also the classes that it names, and the hashes of their files. The source hash is
    also available on a cluster, where a job's upload has no .git.
    """
    root = Path(jebm.__file__).parent
    digest = hashlib.sha256()
    sources = [path for path in root.rglob("*") if path.suffix in _SOURCES and path.is_file()]
    for path in sorted(sources):  # skip the broken links that editors leave
        digest.update(os.fsencode(path.relative_to(root).as_posix()) + b"\0" + path.read_bytes())
    facts = {
        "jebm": jebm.__version__,
        "source_sha256": digest.hexdigest(),
        "git_revision": _git_revision(root),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts if config is None else facts | origins(config, named_modules(config))


def _git_revision(folder: Path) -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(folder), *arguments],  # noqa: S607
            capture_output=True,
            check=True,
            timeout=10,
        )
        return done.stdout.decode("ascii", "replace").strip()  # file names need not be UTF-8

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
