"""Training and evaluation across two hosts, as Debian installs them and cluster/README.md sets them up."""

from __future__ import annotations

import re
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hosts import Host, forwarded, lan, why_not

from jebm.store.checkpoint import Checkpoints
from jebm.store.storage import open_store

ROOT = Path(__file__).parents[2]
README = (ROOT / "cluster/README.md").read_text()
ADDRESSES = {"h1": "192.0.2.10", "h2": "192.0.2.11", "s3": "192.0.2.20"}  # the README's own
SMALL = "--num-cpus=1 --object-store-memory=80000000"  # two hosts share this machine
# Until both are there; Ray's own tools take the cluster's address, not the job server's.
BOTH = "until ray status --address=192.0.2.10:6379 | grep -q '/2.0 CPU'; do sleep 1; done"

REASON = why_not()
pytestmark = [pytest.mark.long, pytest.mark.skipif(REASON is not None, reason=REASON or "")]


def block(heading: str) -> str:
    """Return the first block of commands below a heading of the README."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0]


def line(heading: str, words: str) -> str:
    """Return the one command below a heading that contains these words, without its comment."""
    (found,) = [one for one in block(heading).splitlines() if words in one]
    return found.partition("  #")[0].rstrip()


@dataclass(frozen=True)
class TwoHosts:
    head: Host
    environment: dict[str, str]

    def submit(self, entrypoint: str) -> str:
        """Submit a job on the first host; return what it prints."""
        tokens = line("The token, once", "export RAY_AUTH")
        address = line("Submit, follow, stop, fetch", "export RAY_ADDRESS")
        command = f"{tokens}; {address}; ray job submit --working-dir . -- {entrypoint}"
        return self.head.run(command, self.environment, cwd=ROOT, timeout=600)


@pytest.fixture(scope="module")
def two_hosts(s3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("hosts")
    environment = s3.environment() | {
        "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
        "JEBM_CACHE": str(folder / "cache"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "PYTHONUNBUFFERED": "1",
        "RAY_memory_monitor_refresh_ms": "0",  # each would take the whole machine's memory for its own
    }
    port = urlsplit(environment["AWS_ENDPOINT_URL"]).port
    assert port is not None
    with lan(folder, ADDRESSES) as hosts, forwarded(hosts["s3"], port) as server:
        environment["AWS_ENDPOINT_URL"] = f"http://{ADDRESSES['s3']}:{server}"
        first, second = hosts["h1"], hosts["h2"]
        first.run(block("The token, once"), environment, cwd=ROOT)
        (second.home / ".jebm").mkdir()
        (second.home / ".jebm/auth_token").write_text((first.home / ".jebm/auth_token").read_text())
        exports = line("By hand", "export RAY_AUTH")
        for host, words in ((first, "--head"), (second, "--address")):
            host.run(f"{exports}; {line('By hand', words)} {SMALL}", environment, cwd=host.home)
        first.run(f"{exports}; {BOTH}", environment, cwd=ROOT)
        yield TwoHosts(first, environment)


def test_a_job_trains_and_evaluates_across_hosts(two_hosts: TwoHosts) -> None:
    storage = f"s3://jebm/{uuid.uuid4().hex}"
    output = two_hosts.submit(
        f"python jobs/train.py --config jobs/configs/smoke.yaml --run.storage {storage} --train.epochs 1"
    )
    assert "finished: step 16 of 16" in output
    assert set(re.findall(r"\(ip=(\S+), pid", output)) == {ADDRESSES["h1"], ADDRESSES["h2"]}
    manifest = Checkpoints(open_store(storage), "smoke").latest()
    assert manifest is not None
    assert manifest.world_size == 2
    output = two_hosts.submit(
        f"python jobs/evaluate.py --engine ray --workers 2 --checkpoint {storage}/smoke --samples 100"
    )
    assert "evaluation.html" in output
