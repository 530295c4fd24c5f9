"""Bad input to jobs/train.py: one clear line on stderr, exit code 2, no traceback, before Ray starts."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from refusal import refusal

ROOT = Path(__file__).parents[2]
SMOKE = ["--config", str(ROOT / "jobs/configs/smoke.yaml")]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> "object":
    """Run the job in this process; return its one line."""

    def run(*arguments: str) -> str:
        monkeypatch.setenv("JEBM_CACHE", str(tmp_path / "cache"))
        place = ("--run.storage", str(tmp_path / "runs"))
        written = refusal(capsys, monkeypatch, "train", *SMOKE, *place, *arguments)
        assert written.startswith("error: ")
        return written

    return run


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--energy.widht", "50"], r"unknown key energy\.widht; did you mean energy\.width\?"),
        (["--energy.width", "wide"], r"energy\.width: needs an integer, not 'wide'"),
        (["--data.train", "no/such/set"], r"no/such/set.*jebm ingest"),
        (["--model.image_size", "3"], r"model\.image_size: 3 latent layers halve the image 2 times"),
        (["--model.image_size", "32"], r"data\.train: images are 28x28x1.*ask for 32x32x1"),
        (["--train.batch_size", "1"], r"train\.batch_size: 1 must be at least .* = 2"),
        (["--run.storage", "gs://bucket/x"], r"gs://bucket/x: write s3://bucket/x"),
        (["--run.name", "a b"], r"run\.name: 'a b' must be letters"),
        (["--run.name", "lease"], r"run\.name: 'lease' is the name of something within a run; choose"),
        (["--run.name", "run.json"], r"run\.name: 'run.json' is the name"),
        (["--run.name", "step-00000001-a0001"], r"run\.name: 'step-00000001-a0001' is the name"),
        (["--run.storage", "s3:/bucket/x"], r"run\.storage: s3:/bucket/x: write s3://bucket/x"),
        (["--data.train", "s3:/bucket/x"], r"data\.train: s3:/bucket/x: write s3://bucket/x"),
        (["--run.storage", "memory://x"], r"run\.storage: memory://x: other processes cannot see this"),
        (
            ["--cluster.workers=800", "--train.batch_size=1600"],
            r"800 workers of .* not fit: this machine",
        ),
        (["--energy.width", "1000000"], r"model: nets of these sizes and their optimizers take 12,000 GB"),
        (["--generator.width", "10000000"], r"and this machine has [\d,]+ GB; lower model\.latent_dims"),
        (["--energy.width", "99999999999999"], r"model: nets of these sizes cannot be built"),
        (["--langevin.step_size", "2.5"], r"langevin\.step_size: must lie between 0 and 2"),
        (["--config", ""], r"--config: is empty; give a YAML file"),
        (["--config", "nowhere.yaml"], r"nowhere\.yaml: there is no such file"),
    ],
)
def test_wrong_values(refused, arguments: list[str], line: str) -> None:  # type: ignore[no-untyped-def]
    assert re.search(line, refused(*arguments))


def test_an_unreadable_shard(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    copy = tmp_path / "set"
    shutil.copytree(ROOT / "jobs/data/fashion_mnist_2000/train", copy)
    (part,) = copy.glob("*.parquet")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    line = refused("--data.train", str(copy), "--cluster.engine", "process", "--cluster.workers", "1")
    assert part.name in line


def test_missing_bucket_and_wrong_credentials(refused, s3, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    assert re.search(
        r"s3://no-such-bucket.*does not exist", refused("--run.storage", "s3://no-such-bucket/x")
    )
    storage = s3.uri("refused")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-" + "x" * 20)
    line = refused("--run.storage", storage)
    assert "AWS_SECRET_ACCESS_KEY" in line or "secret" in line
    assert "not-the-secret" not in line


def test_dry_run_shows_the_plan_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *SMOKE, "--run.storage", str(tmp_path / "r"), "--dry-run"])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs/train.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert not ended.value.code
    assert "inference 278,684, generator 108,528, energy 3,351" in shown
    assert "new run" in shown
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tune", "--search", ""], "error: --search: is empty (YAML file: "),
        (["tune", "--search="], "error: --search: is empty (YAML file: "),
        (["compare", "--output", ""], "error: --output: is empty (folder or s3"),
        (["evaluate", ""], "error: unexpected argument ''; see --help"),
    ],
)
def test_an_empty_word_is_no_value(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal(capsys, monkeypatch, *words).startswith(line)
