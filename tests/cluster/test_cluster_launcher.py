"""`ray up` would accept cluster/*.yaml, and a typo in them would not pass for a setting."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import botocore.session
import click
import pytest
import ray.autoscaler
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts

ROOT = Path(__file__).parents[2]
FILES = ["aws.yaml", "local.yaml"]

Config = dict[str, Any]
KeyPath = tuple[str | int, ...]

# Their keys are names that we choose.
CHOSEN_NAMES = {"available_node_types", "file_mounts", "resources"}


def load(name: str) -> Config:
    # Through JSON: YAML anchors would leave one object at several places.
    loaded: Config = json.loads(json.dumps(yaml.safe_load((ROOT / "cluster" / name).read_text())))
    return loaded


@functools.cache
def provider_keys() -> frozenset[str]:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    return frozenset(schema["properties"]["provider"]["properties"])


@functools.cache
def run_instances_shape() -> Any:
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def ray_commands(command: str) -> Iterator[list[str]]:
    """Every `ray …` of a shell command, as words."""
    for part in re.split(r";|&&|\n|\|", command):
        words = shlex.split(re.split(r"\s[<>&]", part)[0], comments=True)
        while words and Path(words[0]).name != "ray":
            words = words[1:]
        if len(words) > 1:
            yield words[1:]


def cli_problem(words: list[str]) -> str | None:
    """Parse the words as Ray's command line does, without running them."""
    command: click.Command = scripts.cli
    while isinstance(command, click.Group):
        found = command.commands.get(words[0])
        if found is None:
            return f"ray has no command {words[0]!r}"
        command, words = found, words[1:]
    try:
        command.make_context(command.name, list(words)).close()
    except click.UsageError as error:
        return error.format_message()
    return None


def problems(config: Config) -> list[str]:
    """What is wrong with a cluster file: by Ray's schema, by EC2's API model, by Ray's command line."""
    found: list[str] = []
    try:
        prepared = prepare_config(json.loads(json.dumps(config)))
        validate_config(prepared)
    except (Exception, SystemExit) as error:
        return [f"{type(error).__name__}: {error}"]
    # Ray's schema lets anything pass in these two.
    found += [f"provider: {key}" for key in config["provider"].keys() - provider_keys()]
    if config["provider"]["type"] == "aws":
        for name, node_type in config["available_node_types"].items():
            request = {**node_type["node_config"], "MinCount": 1, "MaxCount": 1}
            report = ParamValidator().validate(request, run_instances_shape())
            found += [f"{name}: {report.generate_report()}"] if report.has_errors() else []
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in prepared[key]:
            found += [problem for words in ray_commands(command) if (problem := cli_problem(words))]
    return found


def key_paths(value: Any, at: KeyPath = ()) -> Iterator[KeyPath]:
    """Where every key is, but for those that are names of ours."""
    if isinstance(value, dict):
        for key, child in value.items():
            if not (at and at[-1] in CHOSEN_NAMES):
                yield (*at, key)
            yield from key_paths(child, (*at, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from key_paths(child, (*at, index))


def with_typo(config: Config, path: KeyPath) -> Config:
    changed: Config = json.loads(json.dumps(config))
    parent: Any = functools.reduce(lambda value, key: value[key], path[:-1], cast(Any, changed))
    parent[f"{path[-1]}_typo"] = parent.pop(path[-1])
    return changed


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name: str) -> None:
    assert problems(load(name)) == []


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name in FILES for path in key_paths(load(name))], ids=str
)
def test_a_misspelt_key_is_caught(name: str, path: KeyPath) -> None:
    assert problems(with_typo(load(name), path)) != []


def test_a_misspelt_option_of_ray_start_is_caught() -> None:
    config = load("aws.yaml")
    config["head_start_ray_commands"][1] = config["head_start_ray_commands"][1].replace("--head", "--haed")
    assert (
        problems(config) == ["No such option: --haed Did you mean --head?"] or "--haed" in problems(config)[0]
    )


def test_aws_keeps_the_head_on_demand_and_lets_the_workers_go() -> None:
    node_types = load("aws.yaml")["available_node_types"]
    head = node_types.pop(load("aws.yaml")["head_node_type"])
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}
    assert all(worker["min_workers"] == 0 for worker in node_types.values())
    assert {
        worker["node_config"]["InstanceMarketOptions"]["MarketType"] for worker in node_types.values()
    } == {"spot"}


def test_aws_rights_come_from_instance_profiles_and_metadata_needs_a_session() -> None:
    for node_type in load("aws.yaml")["available_node_types"].values():
        assert node_type["node_config"]["IamInstanceProfile"]["Name"].startswith("jebm-ray-")
        assert node_type["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def test_aws_opens_no_port_and_its_gpu_nodes_can_start() -> None:
    config = load("aws.yaml")
    node_types = config["available_node_types"]
    # Ray opens ssh to the internet in the group that it makes for a type without one.
    assert all(node_type["node_config"]["SecurityGroupIds"] for node_type in node_types.values())
    gpu = node_types["gpu_spot"]
    assert 0 < gpu["max_workers"] <= config["max_workers"]
    assert gpu["node_config"]["InstanceType"].endswith(".48xlarge")  # of g5 and g6: 8 GPUs
    for node_type in node_types.values():
        (device,) = node_type["node_config"]["BlockDeviceMappings"]
        disk = device["Ebs"]
        # gp3's own limits: 16,000 operations, 1,000 MiB/s, and a quarter of a MiB/s for each operation.
        assert 3_000 <= disk["Iops"] <= 16_000
        assert 125 <= disk["Throughput"] <= min(1_000, disk["Iops"] / 4)


def test_aws_keeps_decoded_data_on_the_disk_of_the_node() -> None:
    config = load("aws.yaml")
    options = " ".join(config["docker"]["run_options"])
    (cache,) = re.findall(r"--env JEBM_CACHE=(\S+)", options)
    volumes = dict(reversed(pair) for pair in re.findall(r"--volume ([^: ]+):(\S+)", options))
    assert volumes[cache].startswith("/home/ubuntu/")
    made = volumes[cache].replace("/home/ubuntu", "~")
    assert f"mkdir -p {made}" in config["initialization_commands"]


def environments(name: str) -> list[dict[str, str]]:
    """The environment in which each `ray start` of a file runs."""
    config = load(name)
    given = {}
    for option in config.get("docker", {}).get("run_options", []):
        if match := re.fullmatch(r"--env (\w+)=(\S+)", option):
            given[match[1]] = match[2]
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[key]
        if "ray start" in command
    ]
    return [given | dict(re.findall(r"\b(RAY_\w+)=([^\s;]+)", command)) for command in starts]


@pytest.mark.parametrize("name", FILES)
def test_every_node_asks_for_the_token_and_works_at_normal_priority(name: str) -> None:
    head, worker = environments(name)
    for environment in (head, worker):
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"].endswith("/.jebm/auth_token")
        assert environment["RAY_worker_niceness"] == "0"
        assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
        assert float(environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]) > 60
    assert load(name)["file_mounts"]["~/.jebm"] == "~/.jebm"


@pytest.mark.parametrize("name", FILES)
def test_the_dashboard_listens_on_the_head_alone(name: str) -> None:
    start = load(name)["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start


@pytest.mark.parametrize("name", FILES)
def test_mounted_folders_exist_in_the_repository(name: str) -> None:
    local = [source for source in load(name)["file_mounts"].values() if not source.startswith("~")]
    assert local
    assert all((ROOT / source).is_dir() for source in local)


def test_every_ray_command_of_the_readme_exists() -> None:
    blocks = re.findall(
        r"```(?:bash|sh)\n(.*?)```", (ROOT / "cluster/README.md").read_text(), flags=re.DOTALL
    )
    text = "\n".join(blocks).replace("\\\n", " ")
    commands = [words for line in text.splitlines() for words in ray_commands(line)]
    assert ["job", "submit"] in [words[:2] for words in commands]
    assert [problem for words in commands if (problem := cli_problem(words))] == []
