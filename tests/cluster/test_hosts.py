"""A cluster of several hosts, as Debian installs them and cluster/README.md sets them up, and its faults.

Their table is printed row by row: for how long the log shows no step, and how many steps were done again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from hosts import forwarded, lan, why_not
from operated import ADDRESSES, PATIENCE, ROOT, THIN, Cluster, Log, block

from jebm.parser import config_from_dict
from jebm.store.checkpoint import Checkpoints
from jebm.store.storage import open_store
from jebm.train.runtime import Runtime
from jebm.train.state import TrainState

# Ray's own tools take the cluster's address, not the job server's.
STATUS = f"ray status --address={ADDRESSES['h1']}:6379"
IDLE = f"until {STATUS} | grep -q ' 0.0/2.0 CPU'; do sleep 1; done"  # nothing used, nothing reserved
# Started in the background, this test itself would have its programs ignore SIGINT.
JEBM = f"env --default-signal=INT PYTHONPATH={ROOT / 'platform'} python -m jebm"
EVERY, STEPS = 2, 384
VALUES = [
    "--config=jobs/configs/smoke.yaml",
    f"--train.epochs={STEPS // 16}",
    f"--train.report_every_steps={EVERY}",
    "--train.pictures_every_steps=1000",
    "--checkpoint.every_steps=16",
    "--cluster.hang_seconds=45",  # TCP tries again 25 s after a link went down, if it was down for 20
    "--cluster.max_failures=9",
]

REASON = why_not()
pytestmark = [pytest.mark.long, pytest.mark.skipif(REASON is not None, reason=REASON or "")]


@pytest.fixture(scope="module")
def cluster(s3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:  # type: ignore[no-untyped-def]
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
    with lan(folder) as net, ExitStack() as stack:
        made = Cluster(net, environment)
        for name in ADDRESSES:
            made.boot(name)
        server = stack.enter_context(forwarded(made.hosts["s3"], ADDRESSES["s3"], port))
        environment["AWS_ENDPOINT_URL"] = f"http://{ADDRESSES['s3']}:{server}"
        made.hosts["h1"].run(block("The token, once"), environment, cwd=ROOT)
        token = (made.hosts["h1"].home / ".jebm/auth_token").read_text()
        for name in ("h2", "op"):
            (made.hosts[name].home / ".jebm").mkdir()
            (made.hosts[name].home / ".jebm/auth_token").write_text(token)
        stack.callback(made.tunnel.close)
        made.start_head()
        made.join()
        made.ray("h1", f"until {STATUS} | grep -q '/2.0 CPU'; do sleep 1; done")
        yield made


class Faults:
    """The faults of one job, and the rows of their table."""

    def __init__(self, cluster: Cluster, log: Log, tell: Callable[[str], None]) -> None:
        self.cluster, self.log, self.tell = cluster, log, tell
        tell("| fault | no step for | steps lost | group restarted |")

    def see(self, name: str, happen: Callable[[], None], *, restarts: bool | None) -> None:
        """Let a fault happen and end; then wait until the run makes steps again.

        With `restarts` None the group may start anew: whether Ray's own connections outlive it is chance.
        """
        groups, since = len(self.log.groups()), time.monotonic()
        happen()
        if restarts:
            self.log.wait(lambda: len(self.log.groups()) > groups)
        steps = len(self.log.steps())
        self.log.wait(lambda: len(self.log.steps()) >= steps + 2)
        anew = len(self.log.groups()) > groups
        assert restarts in (None, anew), self.log.text
        pairs = [(one, other) for one, other in pairwise(self.log.steps()) if other[0] > since]
        still = max(other[0] - one[0] for one, other in pairs)
        lost = sum(max(0, one[1] - other[1] + EVERY) for one, other in pairs)
        assert lost <= 2 * 16 + EVERY  # since the last checkpoint, or the one before if that was being saved
        self.tell(f"| {name} | {still:.0f} s | {lost} | {'yes' if anew else 'no'} |")

    def thread_stopped(self) -> None:
        host = self.cluster.hosts["h2"]
        pid, rank = self.log.groups()[-1][host.address]
        script = Path(__file__).with_name("stop_thread.py")
        here = rf"rank {rank} on h2 \(pid {pid}\)"
        with host.shell(f"exec python {script} {pid}", self.cluster.environment, cwd=ROOT) as stopper:
            assert stopper.stdout is not None
            assert stopper.stdout.readline() == "stopped\n"
            # It is behind the others, unless it was stopped before its part of the step's last sum.
            self.log.wait_for(rf"no progress at step .*: ({here} is behind|all ranks are within it)")
            self.log.wait_for(rf"{here} stands here:")
            self.log.wait_for(rf"rank {1 - rank} on h1 \(pid \d+\) stands here:")
            stopper.wait(timeout=PATIENCE)

    def host_killed(self) -> None:
        self.cluster.net.power_off(self.cluster.hosts["h2"])
        self.cluster.replace_second()

    def loss_and_delay(self) -> None:
        with self.cluster.net.bad_wire(self.cluster.hosts["h2"], delay=0.02, loss=0.005):
            steps = len(self.log.steps())
            self.log.wait(lambda: len(self.log.steps()) >= steps + 4)

    def link_down(self) -> None:
        self.cluster.net.cut(self.cluster.hosts["h2"])
        time.sleep(20)
        self.cluster.net.mend(self.cluster.hosts["h2"])

    def storage_cut(self) -> None:
        """From the host of rank 0, which saves: what it sends goes to a card that nobody has."""
        (address,) = [at for at, (_, rank) in self.log.groups()[-1].items() if rank == 0]
        (host,) = [host for host in self.cluster.hosts.values() if host.address == address]
        there = f"{ADDRESSES['s3']} dev eth0"
        wrong = f"ip neigh replace {there} lladdr 02:00:00:00:00:99 nud permanent"
        host.run(wrong, self.cluster.environment, cwd=ROOT)
        time.sleep(30)
        host.run(f"ip neigh del {there}", self.cluster.environment, cwd=ROOT)

    def drained(self) -> None:
        said = len(self.log.lines)
        listed = self.cluster.ray("h1", "ray list nodes --address http://127.0.0.1:8265 --format json")
        nodes = json.loads(listed[listed.index("[") :])
        (node,) = [
            node["node_id"]
            for node in nodes
            if (node["node_ip"], node["state"]) == (ADDRESSES["h2"], "ALIVE")
        ]
        self.cluster.ray(
            "h1",
            f"ray drain-node --address {ADDRESSES['h1']}:6379 --node-id {node} "
            "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message test --deadline-remaining-seconds 15",
        )
        end = time.monotonic() + 15
        self.log.wait_for("nodes are about to go: saving", said)
        time.sleep(max(0.0, end - time.monotonic()))
        self.host_killed()

    def head_killed(self) -> None:
        """And everything started anew, by hand; only the job comes back by itself."""
        said = len(self.log.lines)
        self.cluster.net.power_off(self.cluster.hosts["h1"])
        self.cluster.tunnel.close()
        self.log.wait_for("no answer from http://127.0.0.1:8265", said)
        self.cluster.boot("h1")
        self.cluster.start_head()
        self.cluster.ray("h2", "ray stop --force")
        self.cluster.join()
        self.log.wait_for("lost with the head, .* restart 1 of ", said)

    def silent_death(self) -> None:
        host, said = self.cluster.hosts["h2"], len(self.log.lines)
        pid, rank = self.log.groups()[-1][host.address]
        self.cluster.net.cut(host)
        self.cluster.net.power_off(host)
        named = rf"rank {rank} on h2 \(pid {pid}\)( or its launcher, .*)? no longer answers"
        self.log.wait_for(rf"no progress at step .*: {named}", said)
        self.cluster.replace_second()


@pytest.mark.timeout(1500)
def test_a_run_outlives_what_befalls_its_hosts(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def tell(row: str) -> None:
        with capsys.disabled():
            print(row, flush=True)

    storage = f"s3://jebm/{uuid.uuid4().hex}"
    train = ["jobs/train.py", *VALUES, "--cluster.workers=2"]
    cluster.net.limit(cluster.hosts["h2"], THIN)
    with ExitStack() as stack:
        submit = f"{JEBM} submit -- python {' '.join(train)} --run.storage={storage}"
        job = stack.enter_context(cluster.as_operator(submit))
        faults = Faults(cluster, log := Log(job), tell)
        log.wait(lambda: len(log.steps()) >= 4)
        assert set(log.groups()[-1]) == {ADDRESSES["h1"], ADDRESSES["h2"]}
        # A new group each time, so that the slowest step of one fault does not excuse the next.
        faults.see("one thread stopped", faults.thread_stopped, restarts=True)
        faults.see("host killed, and back", faults.host_killed, restarts=True)
        faults.see("link down for 20 s", faults.link_down, restarts=None)
        faults.see("0.5 % loss, 20 ms each way", faults.loss_and_delay, restarts=None)
        faults.see("S3 cut from rank 0 for 30 s", faults.storage_cut, restarts=None)
        faults.see("drained, 15 s notice, and back", faults.drained, restarts=True)
        faults.see("head killed", faults.head_killed, restarts=True)
        # The same run without faults, while the other mostly waits.
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
        straight = stack.enter_context(
            subprocess.Popen(
                [*torchrun, *train, f"--run.storage={tmp_path}"],
                cwd=ROOT,
                env={key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
                stdout=subprocess.DEVNULL,
            )
        )
        stack.callback(straight.terminate)
        faults.see("host dies silently, another comes", faults.silent_death, restarts=True)
        assert log.steps()[-1][1] < STEPS, "the run has ended before all faults were made"
        cluster.net.limit(cluster.hosts["h2"], None)
        assert job.wait(timeout=PATIENCE) == 0, log.text
        assert straight.wait(timeout=PATIENCE) == 0
    assert f"finished: step {STEPS} of {STEPS}" in log.text
    with_faults, without = tensors(storage), tensors(str(tmp_path))
    equal = sum(torch.equal(with_faults[name], without[name]) for name in without)
    tell(f"{equal} of {len(without)} tensors as without faults, bit for bit")
    assert equal == len(without) == len(with_faults)
    cluster.ray("h1", IDLE)
    # An evaluation is spread over the hosts as well.
    place = f"--checkpoint {storage}/smoke --samples 100"
    evaluate = f"python jobs/evaluate.py --engine ray --workers 2 {place}"
    with cluster.as_operator(f"ray job submit --working-dir . -- {evaluate}") as evaluation:
        output, _ = evaluation.communicate(timeout=PATIENCE)
    assert "evaluation.html" in output


def tensors(storage: str) -> dict[str, torch.Tensor]:
    """Return the tensors of the newest checkpoint."""
    checkpoints = Checkpoints(open_store(storage), "smoke")
    manifest = checkpoints.latest()
    assert manifest is not None
    assert (manifest.step, manifest.world_size) == (STEPS, 2)
    state = TrainState.build(config_from_dict(manifest.config), Runtime(0, 1, torch.device("cpu")))
    checkpoints.load(manifest, state.tensors())
    return state.tensors()


def test_a_sweep_whose_driver_is_killed_goes_on_and_reserves_nothing_twice(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Trials of two workers: what the dead driver's trial has reserved is needed by the next."""
    search = tmp_path / "search.yaml"
    objective = "{metric: distortion, direction: minimize}"
    search.write_text(f"space: {{langevin.steps: [choice, [5]]}}\nobjective: {objective}\nsampler: grid\n")
    values = f"--train.epochs=2 --run.storage=s3://jebm/{uuid.uuid4().hex} --cluster.workers=2"
    tune = f"python jobs/tune.py --config=jobs/configs/smoke.yaml --search={search} {values}"
    with cluster.as_operator(f"{JEBM} submit -- {tune}") as job:
        log = Log(job)
        log.wait(lambda: len(log.groups()) == 1)
        cluster.hosts["h1"].run("kill -9 $(pgrep -f '^python jobs/tune.py')", cluster.environment, cwd=ROOT)
        assert job.wait(timeout=PATIENCE) == 0, log.text
    assert "restart 1 of 10" in log.text
    cluster.ray("h1", IDLE)


def test_the_operator_gets_exit_codes_and_may_leave(cluster: Cluster) -> None:
    with ExitStack() as stack:

        def submitted(words: str) -> subprocess.Popen[str]:
            return stack.enter_context(cluster.as_operator(f"{JEBM} submit {words}"))

        ends = {code: submitted(f"--restarts 1 -- python -c 'raise SystemExit({code})'") for code in (2, 7)}
        staying = submitted("-- sleep 600")
        log = Log(staying)
        log.wait_for("sent jebm-")
        leave = "kill -INT $(pgrep -f '^python -m jebm submit -- sleep')"
        cluster.hosts["op"].run(leave, cluster.environment, cwd=ROOT)
        assert staying.wait(timeout=PATIENCE) == 130, log.text
        words = r"detached; (jebm-\S+) runs on, and is not restarted; (ray job stop \1) ends it"
        detached = re.search(words, log.text)
        assert detached is not None, log.text
        output, _ = stack.enter_context(cluster.as_operator(detached[2])).communicate(timeout=PATIENCE)
        assert f"'{detached[1]}' was stopped" in output
        # 2 is for the user to mend; another code may be nobody's fault.
        for code, sent in ((2, 1), (7, 2)):
            output, _ = ends[code].communicate(timeout=PATIENCE)
            assert (ends[code].returncode, output.count("sent jebm-")) == (code, sent), output
