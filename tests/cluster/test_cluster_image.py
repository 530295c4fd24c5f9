"""The image: fixed base, no root, no secret, and only what it needs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()

SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|PRIVATE KEY|(?:secret|password|passwd|token|access_key)\w*\s*=\s*[\"']?[^\s\"'$]",
    re.IGNORECASE,
)


def instructions(text: str) -> list[tuple[str, str]]:
    """Dockerfile → (INSTRUCTION, arguments), without comments and with continued lines joined."""
    body = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", body)
    words = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(word[0].upper(), word[1] if len(word) > 1 else "") for word in words]


def problems(text: str) -> list[str]:
    """What hadolint finds, and what it cannot know: our files, our user, our secrets."""
    command = [str(Path(sys.executable).parent / "hadolint"), "--format", "json", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    found = [f"{problem['code']}: {problem['message']}" for problem in json.loads(done.stdout)]
    user = "root"
    for instruction, rest in instructions(text):
        if instruction == "USER":
            user = rest.split(":")[0]
        elif instruction == "COPY":
            words = rest.split()
            sources = [word for word in words[:-1] if not word.startswith("--")]
            found += [f"COPY {source}: not there" for source in sources if not (ROOT / source).exists()]
            found += [f"COPY {source}: .dockerignore leaves it out" for source in sources if not kept(source)]
            if not any(word.startswith("--chown=") for word in words):
                found.append(f"COPY {rest}: belongs to root")
        if SECRET.search(rest):
            found.append(f"{instruction}: looks like a secret")
    if user in {"root", "0"}:
        found.append("runs as root")
    return found


def pattern(line: str) -> re.Pattern[str]:
    """One line of .dockerignore, as Docker reads it."""
    escaped = re.escape(line.strip("/"))
    for shell, regular in (
        (r"\*\*/", "(?:.*/)?"),
        (r"\*\*", ".*"),
        (r"\*", "[^/]*"),
        (r"\[", "["),
        (r"\]", "]"),
    ):
        escaped = escaped.replace(shell, regular)
    return re.compile(escaped)


def kept(name: str) -> bool:
    """Whether a path reaches the build: the last line that matches it, or a parent, decides."""
    path = PurePosixPath(name)
    names = [path.as_posix(), *(parent.as_posix() for parent in path.parents if parent.name)]
    keep = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        if any(pattern(line.removeprefix("!")).fullmatch(candidate) for candidate in names):
            keep = line.startswith("!")
    return keep


def test_the_dockerfile_is_sound() -> None:
    assert problems(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("${RAY_VERSION}-py311-cpu", "latest", "DL3007"),
        (":${RAY_VERSION}-py311-cpu", "", "DL3006"),
        (" && rm -rf /var/lib/apt/lists/*", "", "DL3009"),
        ("USER 1000:100", "USER root", "runs as root"),
        ("USER 1000:100", "", "runs as root"),
        ("COPY --chown=1000:100 jobs/ jobs/", "ADD jobs/ jobs/", "DL3020"),
        ("COPY --chown=1000:100 jobs/ jobs/", "COPY jobs/ jobs/", "belongs to root"),
        ("requirements/cluster.txt requirements/", "requirements/clutser.txt requirements/", "not there"),
        ("COPY --chown=1000:100 jobs/ jobs/", "COPY --chown=1000:100 setup.cfg ./", "leaves it out"),
        ("--no-cache-dir ", "", "DL3042"),
        ("HEALTHCHECK NONE", "RUN apt-get update && apt-get install -y git", "DL3015"),
        ("PYTHONUNBUFFERED=1", "AWS_SECRET_ACCESS_KEY=abc", "looks like a secret"),
        ("PYTHONUNBUFFERED=1", "RAY_AUTH_TOKEN=abc", "looks like a secret"),
    ],
)
def test_a_planted_fault_is_caught(old: str, new: str, said: str) -> None:
    assert old in DOCKERFILE
    assert said in "; ".join(problems(DOCKERFILE.replace(old, new)))


def test_labels_and_python_path() -> None:
    text = " ".join(f"{instruction} {rest}" for instruction, rest in instructions(DOCKERFILE))
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in text
    assert "PYTHONPATH=/home/ray/jebm/platform" in text
    assert "WORKDIR /home/ray/jebm" in text


@pytest.mark.parametrize(
    "name",
    [
        "LICENSE",
        "platform/jebm/__init__.py",
        "jobs/train.py",
        "jobs/data/sample.parquet",
        "cluster/aws.yaml",
        "requirements/cluster.txt",
    ],
)
def test_what_the_image_needs_reaches_the_build(name: str) -> None:
    assert kept(name)


@pytest.mark.parametrize(
    "name",
    [
        ".git/config",
        ".venv/bin/python",
        ".env",
        "jobs/.env.local",
        "data/train.parquet",
        "runs/first/metrics.jsonl",
        ".s3/bucket/object",
        "jobs/server.pem",
        "cluster/auth_token",
        "platform/private.key",
        "cluster/credentials.json",
        "platform/jebm/__pycache__/config.cpython-311.pyc",
        "platform/jebm/config.pyc",
        "platform/jebm.egg-info/PKG-INFO",
        "tests/test_house.py",
    ],
)
def test_secrets_and_data_do_not_reach_the_build(name: str) -> None:
    assert not kept(name)


def test_the_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text.splitlines()) > 200
