"""The manifests use fields that Kubernetes and its operators have; others would be dropped without a word."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jsonpatch
import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.scripts import scripts

from jebm.parser import load_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster/kuberay"
CLUSTERS = ["raycluster.yaml", "rayjob.yaml"]
# What an operator defines, from its own CRDs (scripts/write-kubernetes-schema); all else is Kubernetes' own.
CUSTOM = json.loads((Path(__file__).parent / "kubernetes.schema.json").read_text())
KUBERNETES = "1.37"

Manifest = dict[str, Any]
KeyPath = tuple[str | int, ...]


def through_json(loaded: Any) -> Any:
    """Without YAML's anchors, which leave one object at several places."""
    return json.loads(json.dumps(loaded))


def load(name: str) -> Manifest:
    loaded: Manifest = through_json(yaml.safe_load((FOLDER / name).read_text()))
    return loaded


def manifests() -> dict[str, Manifest]:
    """Every manifest of the folder, and each option applied to what kustomization.yaml names for it."""
    found = {
        f"{path.name}[{index}]": through_json(document)
        for path in sorted(FOLDER.glob("*.yaml"))
        if path.name != "kustomization.yaml"
        for index, document in enumerate(yaml.safe_load_all(path.read_text()))
    }
    text = (FOLDER / "kustomization.yaml").read_text()
    targets = dict(re.findall(r"# - \{path: (options/\S+), target: \{kind: (\w+)\}\}", text))
    assert set(targets) == {f"options/{path.name}" for path in FOLDER.glob("options/*.yaml")}
    for option, kind in targets.items():
        patch = jsonpatch.JsonPatch(load(option))
        found[option] = patch.apply(load({"RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml"}[kind]))
    return found


MANIFESTS = manifests()


@functools.cache
def validator(name: str) -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator({**CUSTOM["kinds"][name], "definitions": CUSTOM["definitions"]})


def cluster_of(manifest: Manifest) -> Manifest | None:
    spec = manifest["spec"]
    cluster: Manifest | None = spec.get("rayClusterSpec", None if "entrypoint" in spec else spec)
    return cluster


def problems(manifest: Manifest) -> list[str]:
    """What Kubernetes would refuse or drop, and what `ray start` would not know."""
    name = f"{manifest.get('apiVersion')}/{manifest.get('kind')}"
    if name not in CUSTOM["kinds"]:
        try:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        except (
            kubernetes_validate.ValidationError,
            kubernetes_validate.SchemaNotFoundError,
            KeyError,
        ) as error:
            return [f"{type(error).__name__}: {error}"]
        return []
    found = [f"{error.json_path}: {error.message}" for error in validator(name).iter_errors(manifest)]
    cluster = None if found or not name.startswith("ray.io/") else cluster_of(manifest)
    if cluster:
        options = {option for parameter in scripts.start.params for option in parameter.opts}
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            keys = group["rayStartParams"]
            found += [f"ray start: --{key}" for key in keys if f"--{key}" not in options]
    return found


# Their keys are names of ours, or of whoever made the node.
NAMED_BY_US = {"labels", "matchLabels", "nodeSelector", "clusterSelector", "limits", "requests"}


def key_paths(value: Any, at: KeyPath = ()) -> Iterator[KeyPath]:
    """Where every key is, but for those that are names."""
    if isinstance(value, dict):
        for key, child in value.items():
            if not (at and at[-1] in NAMED_BY_US):
                yield (*at, key)
            yield from key_paths(child, (*at, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from key_paths(child, (*at, index))


def with_typo(manifest: Manifest, path: KeyPath) -> Manifest:
    changed: Manifest = through_json(manifest)
    parent: Any = functools.reduce(lambda value, key: value[key], path[:-1], cast(Any, changed))
    parent[f"{path[-1]}Typo"] = parent.pop(path[-1])
    return changed


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_field_is_known(name: str) -> None:
    assert problems(MANIFESTS[name]) == []


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_misspelt_key_is_caught_wherever_it_is(name: str) -> None:
    paths = set(key_paths(MANIFESTS[name]))
    if name.startswith("options/"):  # the rest is the manifest's own
        paths -= {path for base in CLUSTERS for path in key_paths(load(base))}
    assert paths
    assert [path for path in paths if not problems(with_typo(MANIFESTS[name], path))] == []


def pods(manifest: Manifest) -> dict[str, Manifest]:
    """The pods of a Ray cluster or job, by the name of their group."""
    found = {}
    if cluster := cluster_of(manifest):
        found["head"] = cluster["headGroupSpec"]["template"]["spec"]
        for group in cluster["workerGroupSpecs"]:
            found[group["groupName"]] = group["template"]["spec"]
    if submitter := manifest["spec"].get("submitterPodTemplate"):
        found["submitter"] = submitter["spec"]
    return found


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_cluster_asks_for_a_token_and_the_head_takes_no_work(name: str) -> None:
    spec = cluster_of(load(name))
    assert spec is not None
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["enableInTreeAutoscaling"] is True


@pytest.mark.parametrize("name", [*CLUSTERS, "sweep.yaml"])
def test_no_pod_runs_as_root_or_holds_a_key(name: str) -> None:
    for pod in pods(load(name)).values():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["serviceAccountName"] == "jebm"
        for container in pod["containers"]:
            variables = {variable["name"] for variable in container.get("env", [])}
            assert not {
                variable for variable in variables if re.search(r"KEY|SECRET|TOKEN|PASSWORD", variable)
            }


def gibibytes(quantity: str) -> float:
    assert quantity.endswith("Gi")
    return float(quantity.removesuffix("Gi"))


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_cache_is_a_volume_that_the_pod_may_fill(name: str) -> None:
    for group, pod in pods(load(name)).items():
        if group == "submitter":
            continue
        (container,) = pod["containers"]
        (volume,) = pod["volumes"]
        (mount,) = container["volumeMounts"]
        assert volume["name"] == mount["name"]
        assert {"name": "JEBM_CACHE", "value": mount["mountPath"]} in container["env"]
        asked, allowed = container["resources"]["requests"], container["resources"]["limits"]
        assert asked["ephemeral-storage"] == allowed["ephemeral-storage"]
        # Kubernetes counts the volume as the pod's, and evicts a pod over its limit.
        assert gibibytes(volume["emptyDir"]["sizeLimit"]) < gibibytes(allowed["ephemeral-storage"])


@pytest.mark.parametrize("name", CLUSTERS)
def test_one_pod_takes_an_8_gpu_node(name: str) -> None:
    spec = cluster_of(load(name))
    assert spec is not None
    (group,) = (group for group in spec["workerGroupSpecs"] if group["groupName"] == "gpu")
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 4)
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert list(pod["nodeSelector"]) == ["node.kubernetes.io/instance-type"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_drained_node_keeps_the_head(name: str) -> None:
    spec = cluster_of(load(name))
    assert spec is not None
    template = spec["headGroupSpec"]["template"]
    support = {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in MANIFESTS.values()}
    assert ("PriorityClass", template["spec"]["priorityClassName"]) in support
    budgets = [
        manifest["spec"]
        for (kind, _), manifest in support.items()
        if kind == "PodDisruptionBudget"
        and manifest["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ]
    assert [budget["minAvailable"] for budget in budgets] == [1]


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_worker_has_time_to_save_before_it_is_killed(name: str) -> None:
    for group, pod in pods(load(name)).items():
        if group in ("head", "submitter"):
            continue
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
    standing, of_a_job = (json.dumps(cluster_of(load(name))) for name in CLUSTERS)
    label = '"app.kubernetes.io/instance": "jebm'
    assert of_a_job.replace(f'{label}-smoke"', f'{label}"') == standing


@pytest.mark.parametrize(("name", "script"), [("rayjob.yaml", "train"), ("sweep.yaml", "tune")])
def test_a_job_starts_files_that_exist_with_a_valid_config_and_stores_in_a_bucket(
    name: str, script: str
) -> None:
    manifest = load(name)
    words = shlex.split(manifest["spec"]["entrypoint"])
    assert words[:2] == ["python", f"jobs/{script}.py"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert options["--run.storage"].startswith("s3://")
    values = {key.removeprefix("--"): value for key, value in options.items()}
    values.pop("search", None)
    load_config(ROOT / values.pop("config"), {key: yaml.safe_load(value) for key, value in values.items()})
    if script == "tune":
        assert (ROOT / options["--search"]).is_file()
        # KubeRay refuses these with a cluster that is already there.
        assert not {"backoffLimit", "suspend", "rayClusterSpec"} & manifest["spec"].keys()
        assert manifest["spec"]["clusterSelector"] == {
            "ray.io/cluster": load("raycluster.yaml")["metadata"]["name"]
        }


def test_a_queued_job_starts_suspended_with_a_fixed_number_of_nodes() -> None:
    """Kueue refuses a job whose cluster the autoscaler may grow."""
    manifest = MANIFESTS["options/kueue.yaml"]
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert manifest["spec"]["suspend"] is True
    cluster = cluster_of(manifest)
    assert cluster is not None
    assert cluster["enableInTreeAutoscaling"] is False
    cpus = sum(
        group["replicas"] * float(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        for group in cluster["workerGroupSpecs"]
    )
    words = shlex.split(manifest["spec"]["entrypoint"])
    config = load_config(ROOT / words[words.index("--config") + 1])
    assert cpus >= config.cluster.workers * config.cluster.cpus_per_worker
