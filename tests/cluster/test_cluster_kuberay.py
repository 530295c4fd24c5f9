"""The manifests use fields that KubeRay has. Kubernetes would drop a misspelt one without a word."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jsonschema
import pytest
import yaml
from ray.scripts import scripts

ROOT = Path(__file__).parents[2]
FILES = ["raycluster.yaml", "rayjob.yaml"]
VALIDATOR = jsonschema.Draft7Validator(
    json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
)

Manifest = dict[str, Any]
KeyPath = tuple[str | int, ...]


def load(name: str) -> Manifest:
    # Through JSON: YAML anchors would leave one object at several places.
    loaded: Manifest = json.loads(json.dumps(yaml.safe_load((ROOT / "cluster/kuberay" / name).read_text())))
    return loaded


def cluster_spec(name: str) -> Manifest:
    spec: Manifest = load(name)["spec"]
    cluster: Manifest = spec.get("rayClusterSpec", spec)
    return cluster


def pod_templates(name: str) -> list[Manifest]:
    spec = cluster_spec(name)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    submitter = load(name)["spec"].get("submitterPodTemplate")
    return [group["template"] for group in groups] + ([submitter] if submitter else [])


def problems(manifest: Manifest) -> list[str]:
    found = [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(manifest)]
    if found:
        return found
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    options = {option for parameter in scripts.start.params for option in parameter.opts}
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        found += [f"ray start: --{key}" for key in group["rayStartParams"] if f"--{key}" not in options]
    return found


def key_paths(value: Any, at: KeyPath = ()) -> Iterator[KeyPath]:
    """Where every key is. Labels are ours to name."""
    if isinstance(value, dict):
        for key, child in value.items():
            if not (at and at[-1] == "labels"):
                yield (*at, key)
            yield from key_paths(child, (*at, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from key_paths(child, (*at, index))


def with_typo(manifest: Manifest, path: KeyPath) -> Manifest:
    changed: Manifest = json.loads(json.dumps(manifest))
    parent: Any = functools.reduce(lambda value, key: value[key], path[:-1], cast(Any, changed))
    parent[f"{path[-1]}Typo"] = parent.pop(path[-1])
    return changed


@pytest.mark.parametrize("name", FILES)
def test_kuberay_knows_every_field(name: str) -> None:
    assert problems(load(name)) == []


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name in FILES for path in key_paths(load(name))], ids=str
)
def test_a_misspelt_key_is_caught(name: str, path: KeyPath) -> None:
    assert problems(with_typo(load(name), path)) != []


@pytest.mark.parametrize("name", FILES)
def test_the_cluster_asks_for_a_token_and_the_head_takes_no_work(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["enableInTreeAutoscaling"] is True


@pytest.mark.parametrize("name", FILES)
def test_no_pod_runs_as_root_or_holds_a_key(name: str) -> None:
    for template in pod_templates(name):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["serviceAccountName"] == "jebm"
        for container in pod["containers"]:
            variables = {variable["name"] for variable in container.get("env", [])}
            assert not {
                variable for variable in variables if re.search(r"KEY|SECRET|TOKEN|PASSWORD", variable)
            }


@pytest.mark.parametrize("name", FILES)
def test_a_worker_has_time_to_save_before_it_is_killed(name: str) -> None:
    (worker,) = cluster_spec(name)["workerGroupSpecs"]
    pod = worker["template"]["spec"]
    shell, flag, script = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, flag) == ("/bin/bash", "-c")
    drain, wait = script.split("&&", maxsplit=1)
    timeout, tell_seconds, ray, command, *arguments = shlex.split(drain)
    assert (timeout, ray, command) == ("timeout", "ray", "drain-node")
    with scripts.drain_node.make_context(command, arguments) as context:
        save_seconds = context.params["deadline_remaining_seconds"]
    assert f"seq {save_seconds})" in wait
    assert int(tell_seconds) + save_seconds < pod["terminationGracePeriodSeconds"] <= 120


def test_both_files_describe_the_same_cluster() -> None:
    assert cluster_spec("rayjob.yaml") == cluster_spec("raycluster.yaml")


def test_the_job_starts_files_that_exist_and_stores_in_a_bucket() -> None:
    words = shlex.split(load("rayjob.yaml")["spec"]["entrypoint"])
    assert words[:2] == ["python", "jobs/train.py"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options["--run.storage"].startswith("s3://")
    (group,) = cluster_spec("rayjob.yaml")["workerGroupSpecs"]
    assert group["minReplicas"] == 0
    assert options["--cluster.autoscales"] == "true"  # or the job would refuse: no worker is there yet
    assert (ROOT / "jobs/train.py").is_file()
    assert (ROOT / options["--config"]).is_file()
