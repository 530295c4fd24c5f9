"""The cost of a checkpoint: our way, Ray's way and the bare wire, on the same server in one run.

    benchmarks/checkpoint.py                    upload, asynchronous upload and restore
    benchmarks/checkpoint.py stall              what saving costs a training loop

Ray's way is torch.save to disk and pyarrow's upload; download and torch.load. The bare wire sends the same
bytes over presigned URLs and checks nothing. Each figure comes from a separate process; the ways take turns,
so that a busy moment of the machine affects all of them. Without --uri a server is started in memory-backed
storage. It runs on the same cores, so memory, disk and CPU are more reliable than wall time.
"""

import argparse
import contextlib
import http.client
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import pyarrow.fs
import torch
from boto3.session import Session
from torch import Tensor

from jebm.store.checkpoint import Checkpoints, Facts
from jebm.store.storage import arrow_uri, open_store
from jebm.store.writer import AsyncWriter

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent
MB = 1_000_000
TENSORS = 64
RAYS_CHUNK = 64 << 20
WIRES = 4  # download connections of the bare wire
WAYS = {
    "upload": ("ours", "ray", "wire"),
    "async": ("ours",),
    "restore": ("ours", "ray", "wire"),
}
FACTS = Facts(step=1, attempt=1, world_size=1, config={}, provenance={}, metrics={}, state={}, parent=None)
Figures = dict[str, float]


def main() -> int:
    """Run the benchmark and print its table; return the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks/checkpoint.py", description=__doc__.splitlines()[0])
    parser.add_argument("mode", nargs="?", choices=["transfer", "stall"], default="transfer")
    parser.add_argument("--megabytes", type=float, default=268.0, help="size of the state (%(default)s)")
    parser.add_argument("--uri", help="where to write, s3://bucket/prefix (default: a server of our own)")
    parser.add_argument("--runs", type=int, default=3, help="rounds; medians are shown (%(default)s)")
    parser.add_argument("--seconds", type=float, default=70.0, help="stall: length of one run (%(default)s)")
    parser.add_argument(
        "--every", type=float, default=30.0, help="stall: seconds between saves (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the task of a child process
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that our server ends with us
    # Use the given storage, or a server that ends with this process.
    with contextlib.ExitStack() as stack:
        environment = dict(os.environ)
        uri = arguments.uri
        if uri is None:
            environment |= stack.enter_context(server())
            uri = "s3://jebm"
        uri = f"{uri.rstrip('/')}/benchmark-{uuid.uuid4().hex[:8]}"
        table = (transfer if arguments.mode == "transfer" else stall)(arguments, uri, environment)
    print(json.dumps(table, indent=1) if arguments.json else shown(table))
    return 0


def transfer(
    arguments: argparse.Namespace, uri: str, environment: Mapping[str, str]
) -> list[dict[str, object]]:
    """Measure all ways in turn; return the rows of the table."""
    taken: dict[tuple[str, str], list[Figures]] = {}
    for _ in range(arguments.runs):
        for what, ways in WAYS.items():
            for way in ways:
                taken.setdefault((what, way), []).append(child(arguments, f"{what}-{way}", uri, environment))
    rows: list[dict[str, object]] = []
    for (what, way), runs in taken.items():
        figures = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        rays = {
            name: statistics.median(run[name] for run in taken["upload" if what == "async" else what, "ray"])
            for name in ("wall_s", "cpu_s")
        }
        row: dict[str, object] = {"what": what, "way": way}
        row |= {name: round(value, 3) for name, value in figures.items()}
        row["wall_ray_over_this"] = round(rays["wall_s"] / figures["wall_s"], 2)
        row["cpu_this_over_ray"] = round(figures["cpu_s"] / rays["cpu_s"], 2)
        rows.append(row)
    return rows


def stall(arguments: argparse.Namespace, uri: str, environment: Mapping[str, str]) -> list[dict[str, object]]:
    """Run the same loop with and without saves, in turn; return the rows of the table."""
    rows: list[dict[str, object]] = []
    for _ in range(arguments.runs):
        for way in ("off", "on"):
            figures = child(arguments, f"stall-{way}", uri, environment)
            rows.append({"saves": way} | {name: round(value, 4) for name, value in figures.items()})
    return rows


def child(arguments: argparse.Namespace, what: str, uri: str, environment: Mapping[str, str]) -> Figures:
    """Return the figures of one measurement in a fresh process."""
    command = [sys.executable, __file__, "--measure", what, "--uri", uri]
    for name in ("megabytes", "seconds", "every"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    print(f"{what}: {figures}", file=sys.stderr)
    return figures


@contextlib.contextmanager
def server() -> Iterator[dict[str, str]]:
    """Run a server in memory-backed storage; yield the environment of its clients."""
    memory = Path("/dev/shm")
    home = Path(tempfile.mkdtemp(prefix="jebm-benchmark-", dir=memory if memory.is_dir() else None))
    script = [sys.executable, str(ROOT / "scripts" / "s3")]
    try:
        subprocess.run([*script, "start", "--dir", str(home)], check=True, stdout=sys.stderr)
        said = subprocess.run(
            [*script, "env", "--dir", str(home)], check=True, capture_output=True, text=True
        ).stdout
        line = next(line for line in said.splitlines() if line.startswith("export "))
        yield dict(word.split("=", 1) for word in shlex.split(line)[1:])
    finally:
        with contextlib.suppress(OSError, ValueError):  # not `stop`: the data is discarded
            os.kill(int((home / "server.pid").read_text()), signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)


# ── In a separate process ───────────────────────────────────────────────────────────────────────────────


def measure(arguments: argparse.Namespace) -> Figures:
    """Do what `--measure` names, and return its cost."""
    what, _, way = arguments.measure.partition("-")
    tensors = state(arguments.megabytes, seed=1)
    uri = arguments.uri
    open_store(uri).put("warm", b"")  # exclude imports, credentials and the first connection
    if what == "stall":
        return training(tensors, uri, arguments.seconds, arguments.every if way == "on" else None)
    if what == "restore":
        target = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        figures = cost(RESTORES[way](target, uri))
        assert all(torch.equal(target[name], tensor) for name, tensor in tensors.items())
        return figures
    return cost(asynchronous(tensors, uri) if what == "async" else UPLOADS[way](tensors, uri))


def state(megabytes: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = round(megabytes * MB / 4 / TENSORS)
    return {f"{number:03d}": torch.rand(count, generator=generator) for number in range(TENSORS)}


def cost(work: Callable[[], object]) -> Figures:
    """Run `work`; return wall and CPU seconds, extra peak memory and bytes written to disk, in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    memory, disk = status("VmRSS"), written()
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "extra_peak_rss_mb": (status("VmHWM") - memory) / MB,
        "disk_mb": (written() - disk) / MB,
    }


def status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def written() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("write_bytes")).split()[1])


def our_upload(tensors: Mapping[str, Tensor], uri: str) -> Callable[[], object]:
    checkpoints = Checkpoints(open_store(uri), "ours")
    return lambda: checkpoints.save(tensors, replace(FACTS, step=int(time.time())))


def asynchronous(tensors: Mapping[str, Tensor], uri: str) -> Callable[[], object]:
    checkpoints = Checkpoints(open_store(uri), f"async-{uuid.uuid4().hex}")

    def work() -> None:
        writer = AsyncWriter(checkpoints, keep_last=1, like=tensors)
        time.sleep(0.5)  # a first save comes seconds after the start
        writer.submit(tensors, FACTS)
        writer.close()

    return work


def rays_upload(tensors: Mapping[str, Tensor], uri: str) -> Callable[[], object]:
    filesystem, path = pyarrow.fs.FileSystem.from_uri(arrow_uri(uri))

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            torch.save(dict(tensors), Path(folder, "state.pt"))
            # With the same options as ray.train._internal.storage.
            pyarrow.fs.copy_files(
                folder,
                f"{path}/ray",
                destination_filesystem=filesystem,
                use_threads=False,
                chunk_size=RAYS_CHUNK,
            )

    return work


def wires_upload(tensors: Mapping[str, Tensor], uri: str) -> Callable[[], object]:
    url = presigned(uri, "put_object")
    size = sum(tensor.nbytes for tensor in tensors.values())

    def work() -> None:
        connection = http.client.HTTPConnection(url.netloc)
        connection.putrequest("PUT", f"{url.path}?{url.query}")
        connection.putheader("Content-Length", str(size))
        connection.endheaders()
        for tensor in tensors.values():
            connection.send(tensor.numpy().data.cast("B"))
        assert connection.getresponse().status == 200
        connection.close()

    return work


def our_restore(into: Mapping[str, Tensor], uri: str) -> Callable[[], object]:
    checkpoints = Checkpoints(open_store(uri), "ours")

    def work() -> None:
        manifest = checkpoints.latest()
        assert manifest is not None
        checkpoints.load(manifest, into)

    return work


def rays_restore(into: Mapping[str, Tensor], uri: str) -> Callable[[], object]:
    filesystem, path = pyarrow.fs.FileSystem.from_uri(arrow_uri(uri))

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            pyarrow.fs.copy_files(f"{path}/ray", folder, source_filesystem=filesystem, chunk_size=RAYS_CHUNK)
            loaded = torch.load(Path(folder, "state.pt"))  # noqa: TID251
            for name, tensor in into.items():
                tensor.copy_(loaded[name])

    return work


def wires_restore(into: Mapping[str, Tensor], uri: str) -> Callable[[], object]:
    url = presigned(uri, "get_object")
    each = next(iter(into.values())).nbytes
    shares = [list(enumerate(into.values()))[begin::WIRES] for begin in range(WIRES)]

    def fetch(share: Sequence[tuple[int, Tensor]]) -> None:
        connection = http.client.HTTPConnection(url.netloc)
        for number, tensor in share:
            span = f"bytes={number * each}-{(number + 1) * each - 1}"
            connection.request("GET", f"{url.path}?{url.query}", headers={"Range": span})
            answer, room = connection.getresponse(), tensor.numpy().data.cast("B")
            filled = 0
            while count := answer.readinto(room[filled:]):
                filled += count
            assert filled == each
        connection.close()

    def work() -> None:
        with ThreadPoolExecutor(WIRES) as pool:
            list(pool.map(fetch, shares))

    return work


UPLOADS: dict[str, Callable[[Mapping[str, Tensor], str], Callable[[], object]]]
UPLOADS = {"ours": our_upload, "ray": rays_upload, "wire": wires_upload}
RESTORES: dict[str, Callable[[Mapping[str, Tensor], str], Callable[[], object]]]
RESTORES = {"ours": our_restore, "ray": rays_restore, "wire": wires_restore}


def presigned(uri: str, operation: str) -> SplitResult:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client = Session(region_name=os.environ.get("AWS_REGION")).client("s3")
    parameters = {"Bucket": bucket, "Key": f"{prefix}/wire"}
    return urlsplit(client.generate_presigned_url(operation, Params=parameters, ExpiresIn=3600))


def training(tensors: Mapping[str, Tensor], uri: str, seconds: float, every: float | None) -> Figures:
    """Train something small for a while; return the speed, and the time spent saving.

    Steps change all tensors in turn, so that a save that read them too late would be wrong.
    """
    torch.set_num_threads(1)  # leaves the other core to the upload, as a GPU leaves the CPU
    writer = None
    if every is not None:
        writer = AsyncWriter(
            Checkpoints(open_store(uri), f"stall-{uuid.uuid4().hex}"), keep_last=1, like=tensors
        )
    # The loop: a product, a change to one tensor, and a save when it is due.
    left, right = torch.rand(384, 384), torch.rand(384, 384)
    names = list(tensors)
    steps, longest, began = 0, 0.0, time.perf_counter()
    due = began + every if every is not None else float("inf")
    while (now := time.perf_counter()) < began + seconds:
        left = torch.tanh(left @ right)
        tensors[names[steps % len(names)]].mul_(0.999)
        if writer is not None and now >= due and every is not None:
            writer.submit(tensors, replace(FACTS, step=steps))
            due += every
        steps += 1
        longest = max(longest, time.perf_counter() - now)
    wall = time.perf_counter() - began
    figures = {"steps_per_s": steps / wall, "longest_step_s": longest}
    if writer is not None:
        writer.close()
        stats = writer.stats
        paused = stats.stall_seconds + stats.stage_seconds
        figures |= {
            "checkpoints": float(stats.committed),
            "pause_per_save_s": paused / stats.submitted,
            "share_lost_percent": 100 * paused / stats.submitted / every if every is not None else 0.0,
            "upload_s": stats.upload_seconds / stats.submitted,
        }
    return figures


def shown(rows: Sequence[Mapping[str, object]]) -> str:
    """Return the rows as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *[[str(row.get(name, "")) for name in names] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
