"""`jebm encode`: the codes of a data set as a table, the same in both forms and for any seed."""

import io
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_models import save

import jebm
from jebm.commands import run_command
from jebm.data.factors import Factor
from jebm.data.shards import write_dataset
from jebm.data.source import Batch, source_from_arrays
from jebm.errors import ConfigError, JebmError
from jebm.store.storage import open_store

IMAGES = np.random.default_rng(1).integers(0, 256, (255, 16, 16, 1), np.uint8)
LABELS = np.arange(255, dtype=np.int32) % 3 - 1
HAIR = np.arange(255, dtype=np.int32)[:, None] % 2
Encode = Callable[..., tuple[int, str]]


@pytest.fixture
def encode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Encode:
    """Run the command on a run and a data set of this test; return the exit code and stderr."""
    monkeypatch.setenv("JEBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save("runs/mine")
    source = source_from_arrays(IMAGES, LABELS, name="made")
    factors = (Factor("hair", ("dark", "light")),)
    read = lambda: iter([Batch(IMAGES, LABELS, HAIR)])  # noqa: E731
    write_dataset(replace(source, factors=factors, read=read), open_store("data"))

    def call(*words: str, data: str = "data") -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["encode", "runs/mine", data, *words])
        with pytest.raises(SystemExit) as ended:
            run_command("encode")
        return int(str(ended.value.code)), capsys.readouterr().err

    return call


def test_both_forms_hold_the_models_codes_with_labels_and_factors(encode: Encode, tmp_path: Path) -> None:
    assert encode("--output", "codes.parquet", "--seed", "5")[0] == 0
    assert encode("--output", "made/codes.npz", "--seed", "5")[0] == 0
    codes = jebm.from_pretrained("runs/mine").encode(IMAGES, seed=5)
    table = pq.read_table("codes.parquet")
    names = [f"{what}_z{layer}" for what in ("mean", "sample", "rate") for layer in (1, 2, 3)]
    assert table.column_names == ["label", "factor_hair", *names]
    assert table["label"].to_numpy().tolist() == LABELS.tolist()
    assert table["factor_hair"].to_pylist()[:3] == ["dark", "light", "dark"]
    with np.load(io.BytesIO((tmp_path / "made/codes.npz").read_bytes()), allow_pickle=False) as file:
        arrays = dict(file)
    facts = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    assert json.loads(str(arrays.pop("facts"))) == facts
    assert (facts["run"], facts["step"], facts["seed"]) == ("mine", "7", "5")
    for name, array in arrays.items():
        assert np.array_equal(np.array(table[name].to_pylist(), array.dtype), array), name
    for name, values in (("mean", codes.mean_ND), ("sample", codes.sample_ND)):
        together = np.concatenate([arrays[f"{name}_z{layer}"] for layer in (1, 2, 3)], 1)
        assert np.array_equal(together, values.numpy())
    assert np.array_equal(arrays["rate_z2"], codes.rate_NL[:, 1].numpy())


def test_a_file_in_the_root_folder_is_not_one_in_this_folder(
    encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(uri: str) -> None:
        raise ConfigError(f"opened {uri}")

    monkeypatch.setattr("jebm.commands.encode.open_store", opened)
    for output, folder in {"/a.npz": "/", "a.npz": ".", "/b/a.npz": "/b", "s3://b/a.npz": "s3://b"}.items():
        assert encode("--output", output)[1].endswith(f"opened {folder}\n")


def test_wrong_outputs_and_images_are_one_line(encode: Encode) -> None:
    Path("there.npz").touch()
    Path("folder.npz").mkdir()
    for words, expected in {
        ("--output", "codes.csv"): "must end in .parquet or .npz",
        ("--output", "there.npz"): "is there already",
        ("--output", "folder.npz"): "--output folder.npz: is a folder; name a file",
        ("--output", "codes.npz", "--seed", "-1"): "--seed: -1 must lie between",
    }.items():
        code, error = encode(*words)
        assert (code, error.count("\n")) == (2, 1)
        assert expected in error
    write_dataset(source_from_arrays(IMAGES[:, :8, :8], name="small"), open_store("small"))
    code, error = encode("--output", "codes.npz", data="small")
    assert (code, error.splitlines()[-1].startswith("error: images: are uint8, (255, 8, 8, 1); give")) == (
        2,
        True,
    )
    assert not Path("codes.npz").exists()


def test_what_is_no_image_no_code_and_no_seed_is_refused_in_one_line(tmp_path: Path) -> None:
    save(str(tmp_path / "mine"))
    model = jebm.from_pretrained(str(tmp_path / "mine"))
    pixels, codes = torch.full((2, 1, 16, 16), 255.0), torch.zeros(2, model.model.latent_dim)
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: model.encode(pixels), "floats lie in [-1, 1], and these reach 255; give x / 127.5 - 1"),
        (lambda: model.likelihood(pixels * math.nan), "and these reach nan"),
        (lambda: model.encode([1, 2]), "images: are a list; give uint8 pixels"),  # type: ignore[arg-type]
        (lambda: model.encode(IMAGES, seed=-1), "seed: -1 must lie between 0"),
        (lambda: model.sample(0), "count: 0 must be 1 or more"),
        (lambda: model.sample(1, seed=2**64), "must lie between 0 and 2**63 - 1"),
        (lambda: model.decode(codes[0]), "codes: are torch.float32"),
        (lambda: model.decode(codes[:, 1:]), "give a tensor of finite floats, (N, "),
        (lambda: model.decode(codes + math.inf), "give a tensor of finite floats, (N, "),
        (lambda: model.decode([0.0]), "codes: are a list"),  # type: ignore[arg-type]
    ]
    for call, line in refused:
        with pytest.raises(JebmError, match=re.escape(line)):
            call()
    assert model.encode(pixels / 255).mean_ND.isfinite().all()
