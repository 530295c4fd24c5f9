"""`checkpoint.sharded`: two real processes train, each writes its share, and one of them goes on alone."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from helpers import ROOT, tiny_config

from jebm.config import Config, config_to_dict
from jebm.store.checkpoint import Checkpoints
from jebm.store.storage import open_store
from jebm.train.loop import fit
from jebm.train.runtime import process_runtime
from jebm.train.state import TrainState
from ports import free_port

if TYPE_CHECKING:
    from tests.conftest import S3Server

HERE = Path(__file__).parent


def train(
    folder: Path, configs: Sequence[Config], patience_seconds: float, *environments: Mapping[str, str]
) -> tuple[list[int], list[str]]:
    """Fit the configs by two processes, each with an environment of its own; return exit codes and logs."""
    files = []
    for number, config in enumerate(configs):
        files.append(str(folder / f"{number}.json"))
        Path(files[-1]).write_text(json.dumps(config_to_dict(config)))  # JSON is YAML
    placed = {
        "PYTHONPATH": f"{ROOT / 'platform'}:{HERE}",
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
    }
    logs = [folder / f"log-{rank}" for rank in range(2)]
    processes = []
    for rank, environment in enumerate(environments or ({}, {})):
        with logs[rank].open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(HERE / "fit_worker.py"), str(patience_seconds), *files],
                    env={**os.environ, **placed, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        return [process.wait(timeout=120) for process in processes], [log.read_text() for log in logs]
    finally:
        for process in processes:
            process.kill()


def checkpoints_of(config: Config) -> Checkpoints:
    return Checkpoints(open_store(config.run.storage), config.run.name)


def saved(config: Config) -> dict[str, torch.Tensor]:
    """Return the tensors of the run's newest checkpoint, read by one process."""
    manifest = checkpoints_of(config).latest()
    assert manifest is not None
    with process_runtime(config) as runtime:
        tensors = TrainState.build(config, runtime).tensors()
    checkpoints_of(config).load(manifest, tensors)
    return tensors


def differing(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_what_two_ranks_shard_one_goes_on_from_exactly(tmp_path: Path) -> None:
    def config(name: str, workers: int, epochs: float) -> Config:
        return tiny_config(
            tmp_path / name,
            cluster__workers=workers,
            train__epochs=epochs,
            train__ema_decay=0.9,
            checkpoint__every_steps=3,
            checkpoint__sharded=json.dumps(name == "sharded"),
        )

    codes, logs = train(tmp_path, [config(name, 2, 0.24) for name in ("whole", "sharded")], 60)
    assert codes == [0, 0], logs
    whole, sharded = config("whole", 1, 0.28), config("sharded", 1, 0.28)
    found = checkpoints_of(sharded).list()
    assert [(one.step, one.status) for one in found] == [(6, "committed"), (3, "committed")]
    assert found[0].manifest is not None
    assert (found[0].manifest.world_size, len(found[0].manifest.objects)) == (2, 2)
    first, second = (stored.size for stored in found[0].manifest.objects)
    assert abs(first - second) < 0.1 * first
    assert differing(saved(whole), saved(sharded)) == []
    row = json.loads((tmp_path / "sharded/smoke/metrics.jsonl").read_text().splitlines()[-1])
    assert (row["checkpoint/failures"], row["checkpoint/retries"]) == (0, 0)
    for alone in (whole, sharded):
        with process_runtime(alone) as runtime:
            assert fit(alone, runtime, provenance={}).step == 7
    assert differing(saved(whole), saved(sharded)) == []
    newest = checkpoints_of(sharded).latest()
    assert newest is not None
    assert (newest.parent, newest.world_size, len(newest.objects)) == ("step-00000006-a0001", 1, 1)


def test_a_rank_that_cannot_write_ends_the_run_on_all_ranks(
    s3: "S3Server", s3_uri: str, tmp_path: Path
) -> None:
    config = tiny_config(
        s3_uri,
        cluster__workers=2,
        train__report_every_steps=1,
        checkpoint__every_steps=1,
        checkpoint__sharded="true",
    )
    codes, logs = train(tmp_path, [config], 0.5, {}, s3.environment("reader"))
    assert codes == [1, 1], logs
    assert "no share of rank 1" in logs[0]
    assert "may not write here" in logs[1]
    assert checkpoints_of(config).latest() is None
    rows = open_store(s3_uri).get("smoke/metrics.jsonl").splitlines()
    assert json.loads(rows[-1])["step"] < 20  # of 20: it did not train on for nothing
