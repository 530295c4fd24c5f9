"""experiments/anomalies.py, run as people run it, on digits that are easy to tell."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jebm.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "experiments" / "anomalies.py"
ARMS = ("gaussian", "two_stage", "oracle", "knn", "pca")


def options(folder: Path) -> list[str]:
    return [
        "classes",
        f"--config={REPOSITORY / 'jobs' / 'configs' / 'mnist_digits.yaml'}",
        f"--originals={folder / 'digits'}",
        f"--output={folder / 'output'}",
        "--seeds=[0]",
        "--held_out=[4]",
        f"--arms=[{', '.join(ARMS)}]",
        "--langevin.steps=2",
        "--train.epochs=1",
        "--train.batch_size=60",
    ]


def test_a_digit_unlike_all_others_is_found_and_not_looked_for_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "digits").mkdir()
    random = np.random.default_rng(0)
    for digit in range(10):  # the four is black and white noise, the others are grey
        values = random.integers(0, 2, 15680) if digit == 4 else random.uniform(0.45, 0.55, 15680)
        (tmp_path / "digits" / f"{digit}.json").write_text(json.dumps({"data": values.round(3).tolist()}))
    command = [sys.executable, str(SCRIPT), *options(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (first.returncode, first.stderr) == (0, "")
    kept = [tmp_path / "output" / "rows" / f"without-4-{arm}-0.json" for arm in ARMS]
    rows = [json.loads(path.read_text())["row"] for path in kept]
    before = json.loads(kept[-1].read_text())["identity"]
    for arm, row in zip(ARMS, rows, strict=True):
        # Nine digits of twenty images: four are tested, one of the other sixteen is kept as reference.
        assert (row["normal images"], row["anomalous images"]) == (36, 20)
        assert row["step"] == (0 if arm in {"knn", "pca"} else 2)
        measures = {"auroc": 1.0, "auprc": 1.0, "fpr80": 0.0, "fpr95": 0.0, "auprc at one in ten": 1.0}
        assert row["measures"]["log p(x, z)"] == measures
    assert rows[0]["measures"]["f"]["auroc"] == 0.5  # the Gaussian prior has none
    assert "| two_stage | 1.000 | 1.000 |" in first.stdout
    assert "| joint EBM (paper) | 0.949 | 0.949 |" in first.stdout
    assert "| chance | 0.357 | 0.357 |" in first.stdout  # 20 of 56
    assert "- **held**: not even the oracle moves log p(x, z) by .01" in first.stdout
    assert "- not tested: a better prior ranks better by its own density" in first.stdout

    main = runpy.run_path(str(SCRIPT))["main"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options(tmp_path)])
    main()
    assert capsys.readouterr().out == first.stdout[first.stdout.index("\n**") :]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options(tmp_path), "--energy.depth=3"])
    with pytest.raises(
        ConfigError, match=r"without-4-gaussian-0 has a checkpoint made with another energy\.depth"
    ):
        main()
    # Other originals are other images: neither their sets nor a row of theirs may be taken for these.
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options(tmp_path)])
    (tmp_path / "digits" / "3.json").write_text(json.dumps({"data": [0.25] * 15680}))
    with pytest.raises(ConfigError, match=r"--output: .*output has data sets of other originals"):
        main()
    for name in ("train", "reference", "normal", "anomalous"):
        shutil.rmtree(tmp_path / "output" / "data" / f"without-4-{name}")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options(tmp_path), "--arms=[pca]"])
    main()
    pca = json.loads(kept[-1].read_text())
    assert pca["identity"]["train"] != before["train"]
