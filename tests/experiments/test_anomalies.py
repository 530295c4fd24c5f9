"""experiments/anomalies.py, run as people run it, on digits that are easy to tell."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jebm.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "experiments" / "anomalies.py"


def options(folder: Path) -> list[str]:
    return [
        "digits",
        f"--config={REPOSITORY / 'jobs' / 'configs' / 'mnist_digits.yaml'}",
        f"--originals={folder / 'digits'}",
        f"--output={folder / 'output'}",
        "--seeds=[0]",
        "--digits=[4]",
        "--arms=[joint, gaussian]",
        "--langevin.steps=2",
        "--train.epochs=1",
        "--train.batch_size=36",
    ]


def test_a_digit_unlike_all_others_is_found_and_not_looked_for_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "digits").mkdir()
    random = np.random.default_rng(0)
    for digit in range(10):  # the four is black and white noise, the others are grey
        values = random.integers(0, 2, 7840) if digit == 4 else random.uniform(0.45, 0.55, 7840)
        (tmp_path / "digits" / f"{digit}.json").write_text(json.dumps({"data": values.round(3).tolist()}))
    command = [sys.executable, str(SCRIPT), *options(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (first.returncode, first.stderr) == (0, "")
    kept = [tmp_path / "output" / "rows" / f"without-4-{arm}-0-4.json" for arm in ("joint", "gaussian")]
    rows = [json.loads(path.read_text())["row"] for path in kept]
    for row in rows:
        # Nine digits with two test images each; all ten of the four, which no model has seen; 72 to train on.
        assert (row["normal images"], row["anomalous images"], row["step"]) == (18, 10, 2)
        measures = {"auroc": 1.0, "auprc": 1.0, "fpr80": 0.0, "fpr95": 0.0, "auprc of fifths": 1.0}
        assert row["measures"]["log p(x, z)"] == measures
    assert rows[1]["measures"]["f"]["auroc"] == 0.5  # the Gaussian prior has none
    assert "| joint | 1.000 | 1.000 |" in first.stdout
    assert "| joint - gaussian, paired | 0.000 | 0.000 |" in first.stdout
    assert "| joint EBM (paper) | 0.949 | 0.949 |" in first.stdout
    assert "| chance | 0.100 | 0.100 |" in first.stdout  # 2 of 20: a fifth of the four

    main = runpy.run_path(str(SCRIPT))["main"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options(tmp_path)])
    main()
    assert capsys.readouterr().out == first.stdout[first.stdout.index("\n**") :]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options(tmp_path), "--energy.depth=3"])
    with pytest.raises(
        ConfigError, match=r"without-4-joint-0 has a checkpoint made with another energy\.depth"
    ):
        main()
