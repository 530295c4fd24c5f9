"""One Ray, and one set of packages, wherever a node is described."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
import ray
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
JOBS = ["cluster/kuberay/rayjob.yaml", "cluster/kuberay/sweep.yaml"]
NODES = ["cluster/aws.yaml", "cluster/kuberay/raycluster.yaml", *JOBS]


def lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]


def pins() -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines((ROOT / "requirements/cluster.txt").read_text())]
    return {requirement.name.lower(): requirement for requirement in parsed}


def ranges() -> dict[str, Requirement]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    extras = parser["options.extras_require"]
    text = "\n".join([parser["options"]["install_requires"], extras["ray"], extras["native"]])
    return {requirement.name.lower(): requirement for requirement in map(Requirement, lines(text))}


def pinned_version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    return specifier.version


def ray_versions(text: str) -> set[str]:
    """Every version of Ray that a file names: images, rayVersion, pins, the Dockerfile's argument."""
    pattern = r"(?:rayproject/ray:|rayVersion: |ray\[[a-z,]+\]==|RAY_VERSION=)([0-9][0-9.]*[0-9])"
    return set(re.findall(pattern, text))


@pytest.mark.parametrize("name", [*NODES, "Dockerfile", "requirements/cluster.txt"])
def test_every_file_names_the_ray_that_these_tests_ran_with(name: str) -> None:
    assert ray_versions((ROOT / name).read_text()) == {ray.__version__}


def test_another_version_is_seen() -> None:
    assert ray_versions("image: rayproject/ray:2.59.1-py311-cpu\nrayVersion: 2.60.0") == {"2.59.1", "2.60.0"}


@pytest.mark.parametrize("name", [*NODES, "Dockerfile"])
def test_images_have_the_python_of_the_project(name: str) -> None:
    assert set(re.findall(r"py3\d+", (ROOT / name).read_text())) == {"py311"}


@pytest.mark.parametrize("name", sorted(ranges()))
def test_a_node_installs_what_the_project_asks_for(name: str) -> None:
    wanted, pinned = ranges()[name], pins()[name]
    assert wanted.specifier.contains(pinned_version(pinned))
    assert wanted.extras == pinned.extras


def test_every_package_of_a_node_is_pinned() -> None:
    assert all(pinned_version(requirement) for requirement in pins().values())


@pytest.mark.parametrize("name", JOBS)
def test_a_ray_job_spells_out_the_same_packages(name: str) -> None:
    job = yaml.safe_load((ROOT / name).read_text())
    runtime_env = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert runtime_env["pip"] == lines((ROOT / "requirements/cluster.txt").read_text())
