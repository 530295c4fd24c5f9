"""jobs/evaluate.py: a report beside the run, the same from two processes; errors in one line."""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jebm.config import Config, Data, Energy, Generator, Inference, Langevin, config_to_dict
from jebm.core.model import build_model
from jebm.store.checkpoint import Checkpoints, Facts
from jebm.store.storage import open_store

ROOT = Path(__file__).resolve().parents[2]
FASHION = ROOT / "jobs/data/fashion_mnist_2000"
CONFIG = Config(
    data=Data(str(FASHION / "train"), str(FASHION / "test")),
    inference=Inference((2, 4), 8),
    generator=Generator((2, 4), 8),
    energy=Energy(8),
    langevin=Langevin(4, 0.4),
)

Job = Callable[..., tuple[int, str, str]]


def save_run(storage: Path, name: str, config: Config, **other: Any) -> str:
    """Write a checkpoint of an untrained model, as training would."""
    tensors = {f"model.{key}": tensor for key, tensor in build_model(config).state_dict().items()}
    for key in other.pop("without", ()):
        del tensors[key]
    facts = Facts(
        step=12,
        attempt=1,
        world_size=1,
        config=config_to_dict(config) | other,
        provenance={},
        metrics={},
        state={"data_sha256": "0"},
        parent=None,
    )
    Checkpoints(open_store(str(storage)), name).save(tensors, facts)
    return str(storage / name)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JEBM_CACHE", str(folder / "cache"))
        save_run(folder, "tiny", CONFIG)
        yield folder


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    """Run the job in this process; return its exit code, what it printed, and its errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "jobs/evaluate.py"), run_name="__main__")
        written = capsys.readouterr()
        return int(ended.value.code or 0), written.out, written.err

    return call


def measured(folder: Path) -> dict[str, Any]:
    """Return what the report says, without when and how long."""
    document: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    for key in ("time", "workers", "source_sha256", "git_revision"):
        document["provenance"].pop(key, None)
    del document["lead"][-1]
    for section in document["sections"]:
        del section["seconds"]
    return document


def test_two_processes_find_what_one_finds_to_the_last_digit(storage: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(storage / "tiny"), "--samples", "300"]
    arguments += ["--suite", "likelihood", "ood", "--out-of-distribution", f"more={FASHION / 'train'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "platform")}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    for name, start in (("one", []), ("two", launcher)):
        command = [sys.executable, *start, str(ROOT / "jobs/evaluate.py"), *arguments]
        ended = subprocess.run(
            [*command, "--output", str(tmp_path / name)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("report   ") == 1
        assert f"{tmp_path / name}/evaluation.html" in ended.stdout
    one, two = measured(tmp_path / "one"), measured(tmp_path / "two")
    assert one == two
    assert one["provenance"]["out_of_distribution more"] == "fashion-mnist-2000 (train)"


def test_the_report_lies_beside_the_run_and_the_job_says_how_it_goes(
    storage: Path, job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    code, out, err = job("--checkpoint", str(storage / "tiny"), "--suite", "chains", "--samples", "100")
    assert (code, err) == (0, "")
    folder = storage / "tiny/evaluations/step-00000012-chains"
    assert (folder / "evaluation.html").exists()
    assert caplog.messages[0] == "chains …"
    assert re.match(r"chains: acceptance 0\.\d+, drift of f .*\(\d+ s\)", caplog.messages[1])
    assert out.splitlines()[-1] == f"report   {folder}/evaluation.html"


@pytest.fixture(scope="module")
def places(storage: Path) -> dict[str, str]:
    """Runs and data sets in which something is wrong, by name."""
    energy = config_to_dict(CONFIG)["energy"] | {"heat": 1.0}
    save_run(storage, "old", CONFIG, energy=energy)
    save_run(storage, "holed", CONFIG, without=["model.inference.moments.2.bias"])
    found = {"storage": str(storage)}
    manifest = json.loads((FASHION / "test/dataset.json").read_text())
    changes = {
        "empty": {"images": 0, "parts": []},
        "other": {"channels": 3},
        "few": {"images": 39, "parts": [{**manifest["parts"][0], "images": 39}]},
        "unlabelled": {"labels_sha256": None},
    }
    for name, change in changes.items():
        (storage / name).mkdir()
        (storage / name / "dataset.json").write_text(json.dumps(manifest | change))
        found[name] = str(storage / name)
    return found


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--suite", "qick"], r"suite: unknown name qick; did you mean quick\?"),
        (["--samples", "10"], r"samples: 10 are too few; at least 100"),
        (["--checkpoint", "{storage}/nobody"], r"{storage}/nobody: no such run"),
        (["--checkpoint", "{storage}/tiny/checkpoints/step-00000099-a0001"], r"no whole checkpoint"),
        (["--checkpoint", "{storage}/old"], r"config is not one of this version \(.*energy\.heat.*\)"),
        (["--checkpoint", "{storage}/holed"], r"tensor inference\.moments\.2\.bias is missing"),
        (["--data", "{storage}/none"], r"{storage}/none: no data set here; make one with jebm ingest"),
        (["--data", "{empty}"], r"dataset\.json: .*images is no number"),
        (["--data", "{other}"], r"data: images are 28x28x3, but the checkpoint's model has 28x28x1"),
        (
            ["--data", "{few}"],
            r"data: distances need at least 40 held-out images, and there are 39; .*samples",
        ),
        (
            ["--out-of-distribution", "{few}/test", "{other}/test"],
            r"--out-of-distribution: {storage}/few/test and .*/other/test are both named test; .*NAME=URI",
        ),
        (["--seed", "-1"], r"--seed: -1 must lie between 0 and 2\*\*63 - 1"),
        (["--out-of-distribution", "svhn={other}"], r"out_of_distribution: svhn: images are 28x28x3"),
        (["--suite", "hierarchy", "--data", "{unlabelled}"], r"data: hierarchy needs labels"),
        (["--suite", "hierarchy", "--train", "{unlabelled}"], r"hierarchy trains classifiers on the labels"),
        (["--suite", "samples", "--train", "{unlabelled}"], r"give --features effnetlite0"),
        (["--suite", "ood", "--data", "{unlabelled}"], r"ood needs another data set, or labels"),
        (
            ["--suite", "samples", "--features", "effnetlite0"],
            r"in the clone: pip install -e '\.\[features\]'",
        ),
        (["--features", "inception"], r"features"),
        (["--features", "inceptionv3"], r"evaluation\.inception_weights: .*--inception-weights"),
        (
            ["--inception-weights", "x.pth"],
            r"inception_weights: not for features classifier; give --features",
        ),
        (
            ["--suite", "samples", "--features", "inceptionv3", "--inception-weights", "{storage}/none.pth"],
            r"pip install -e '\.\[fid\]'",
        ),
        (["--gpu"], r"error: --gpu: torch finds no CUDA device on this machine; leave it out"),
        (["--output", "gs://bucket/x"], r"gs://bucket/x: write s3://bucket/x"),
        (["--output", "{other}/dataset.json"], r"dataset\.json is no folder; choose another"),
        (["--workers", "2"], r"workers: 2 processes need torchrun, or --engine ray"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_before_anything_is_measured(
    arguments: list[str],
    line: str,
    places: dict[str, str],
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inception = "torch_fidelity.feature_extractor_inceptionv3"  # here already, where another test took it
    for package in ("efficientnet_lite_pytorch", "torch_fidelity", inception):
        monkeypatch.setitem(sys.modules, package, None)  # not installed
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    given = [argument.format(**places) for argument in arguments]
    if "--checkpoint" not in given:
        given = ["--checkpoint", f"{places['storage']}/tiny", *given]
    code, _, err = job(*given)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert re.search(line.replace("{storage}", places["storage"]), err), err
    assert not [message for message in caplog.messages if message.endswith(" …")]
