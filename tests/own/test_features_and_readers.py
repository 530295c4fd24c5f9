"""Feature nets and readers of the user's own: named, typed, trusted and recorded like other parts."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from jebm.commands import run_command
from jebm.config import Config
from jebm.core.by_class import named_modules, origins
from jebm.data.dataset import ImageSet, load_images
from jebm.data.readers import open_source
from jebm.data.shards import write_dataset
from jebm.data.source import source_from_arrays
from jebm.errors import ConfigError
from jebm.evaluate.features import feature_net
from jebm.evaluate.features.of_images import real_images
from jebm.parser import argument_parser, config_from_dict, load_config, parse_arguments, word_or_class
from jebm.store.storage import open_store

MEANS = {"evaluation.features": {"class_path": "mylab.Means", "init_args": {"edge": 4}}}


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    store = open_store(str(tmp_path / "set"))
    write_dataset(source_from_arrays(pixels_NHWC, name="noise"), store)
    return load_images(store, cache_directory=tmp_path / "cache")


def parse(*words: str) -> Config:
    return parse_arguments(argument_parser("a job"), words)[0]


def command(monkeypatch: pytest.MonkeyPatch, capfd: Any, *words: str) -> tuple[object, str]:
    monkeypatch.setattr(sys, "argv", list(words))
    with pytest.raises(SystemExit) as caught:
        run_command(words[0])
    captured = capfd.readouterr()
    return caught.value.code, captured.out + captured.err


# ── Feature nets ────────────────────────────────────────────────────────────────────────────────────────


def test_a_kind_or_a_class_stands_in_one_key(mylab: Path) -> None:
    Path("kind.yaml").write_text("evaluation: {features: effnetlite0}\n")  # as ever
    Path("mine.yaml").write_text(
        "evaluation:\n  features: {class_path: mylab.Means, init_args: {edge: '4'}}\n"
    )
    assert load_config("kind.yaml").evaluation.features.name == "effnetlite0"
    mine = parse("--config", "mine.yaml")
    assert mine == config_from_dict(MEANS)
    assert parse("--config", "mine.yaml", "--evaluation.features", "classifier") == Config()
    kind = ("--config", "kind.yaml", "--evaluation.features.class_path", "mylab.Means")
    assert parse(*kind, "--evaluation.features.init_args.edge", "4") == mine
    for words, message in (
        (["effnetlite"], "must be one of .*; did you mean effnetlite0"),
        (
            ["{class_path: mylab.Mean}"],
            "evaluation.features.class_path: mylab has no Mean; did you mean Means",
        ),
        (["mine.yaml", "--evaluation.features.init_args.egde", "3"], "must be one of"),
        (["{class_path: mylab.Means, init_args: {egde: 3}}"], "init_args.egde: .* did you mean edge"),
        (["{class_path: mylab.Means, kind: effnetlite0}"], "evaluation.features.kind: is a key of jebm"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse("--evaluation.features", *words)
    with pytest.raises(ConfigError, match=r"--features: needs a mapping such as"):
        word_or_class("{class: mylab.Means}", "--features", ())


def test_a_class_is_a_feature_net_whose_name_and_digest_tell_it_apart(mylab: Path, images: ImageSet) -> None:
    config = config_from_dict(MEANS)
    net = feature_net(config, images, ["mylab"])
    found = real_images(images.images_NHWC, net)
    x_BCHW = torch.from_numpy(images.images_NHWC.copy()).permute(0, 3, 1, 2) / 127.5 - 1
    assert (net.name, net.dimension, found.features_NF.shape) == ("mylab.Means", 19, (64, 19))
    means = F.avg_pool2d(x_BCHW, 2).flatten(1)
    torch.testing.assert_close(found.features_NF[:, :16], means, rtol=1e-5, atol=1e-6)
    assert found.floor.frechet > 0
    # Random weights are the same each time, so that distances compare; other arguments and sources do not.
    torch.manual_seed(5)
    again = feature_net(config, images, ["mylab"])
    assert again.sha256 == net.sha256
    assert again(x_BCHW).equal(net(x_BCHW))
    other = config_from_dict({"evaluation.features.class_path": "mylab.Means"})
    assert feature_net(other, images, ["mylab"]).sha256 != net.sha256
    facts = origins(config, ["mylab"])
    assert facts["evaluation.features.class"] == "mylab.Means"
    assert len(facts["evaluation.features.source_sha256"]) == 64
    with (mylab / "mylab.py").open("a") as file:
        file.write("# changed\n")
    assert feature_net(config, images, ["mylab"]).sha256 != net.sha256


def test_a_feature_net_is_built_only_where_it_is_trusted(mylab: Path, images: ImageSet) -> None:
    config = config_from_dict(MEANS)
    with pytest.raises(ConfigError, match=r"^evaluation.features.class_path: .* add --trust mylab$"):
        feature_net(config, images)
    assert not (mylab / "imported.txt").exists()
    assert named_modules(config) == ("mylab",)
    for name, message in (
        ("Whole", r"Whole makes \[2, 1, 8, 8\] of 2 images, not \[2, F\]"),
        ("SumEnergy", "does not derive from jebm.core.parts.Features"),
    ):
        wrong = config_from_dict({"evaluation.features.class_path": f"mylab.{name}"})
        with pytest.raises(ConfigError, match=message):
            feature_net(wrong, images, ["mylab"])


# ── Readers ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reader_of_ones_own_makes_a_data_set(
    mylab: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("JEBM_CACHE", str(mylab / "cache"))
    scans = mylab / "scans"
    scans.mkdir()
    pixels_NHW = np.random.default_rng(1).integers(0, 256, (30, 6, 6))
    for index, image_HW in enumerate(pixels_NHW):
        np.savetxt(scans / f"{index % 3}-{index:02d}.txt", image_HW, fmt="%d")
    ingest = ("ingest", "scans", "--output", "set/train", "--validation", "10")
    inverted = ("--format", "{class_path: mylab.Scans, init_args: {invert: true}}")
    code, output = command(monkeypatch, capfd, *ingest, *inverted)
    assert code == 0, output
    order = sorted(range(30), key=lambda index: (index % 3, index))
    sets = [load_images(open_store(f"set/{name}")) for name in ("train", "validation")]
    found = np.concatenate([each.images_NHWC for each in sets])[..., 0]
    assert sorted(image.tobytes() for image in found) == sorted(
        (255 - pixels_NHW[order]).astype(np.uint8)[i].tobytes() for i in range(30)
    )
    assert np.bincount(np.concatenate([each.labels_N for each in sets])).tolist() == [10, 10, 10]
    source = json.loads(Path("set/train/dataset.json").read_text())["source"]
    assert source["format"] == "mylab.Scans"
    assert [file["name"] for file in source["files"]] == ["scans", "mylab.py"]
    assert 'reader\'s arguments {"invert": true}' in source["transforms"]
    # The same again is there already; with another reader it is another data set.
    assert "already there: 20 images" in command(monkeypatch, capfd, *ingest, *inverted)[1]
    code, output = command(monkeypatch, capfd, *ingest, "--format", "mylab.Scans")
    assert code == 2
    assert "of other files or options" in output


@pytest.mark.parametrize(
    ("file", "format_", "message"),
    [
        ("scans", "celebs", "format: 'celebs' is unknown; did you mean celeba"),
        ("scans", "mylab.Scan", "format: mylab has no Scan; did you mean Scans"),
        ("scans", "mylab.Means", "does not derive from jebm.data.source.Reader"),
        (
            "scans",
            "{class_path: mylab.Scans, init_args: {inverted: 1}}",
            "no such argument; did you mean invert",
        ),
        ("scans", "{class_path: scans}", "no installed package brings scans"),
        ("scans", "mylab.Scans", "by Scans: no images"),
        ("floats", "mylab.Mixed", "by Mixed: an image must be uint8 (H, W) or (H, W, 3), not float64 (4, 4)"),
        ("shapes", "mylab.Mixed", "by Mixed: an image of (4, 5, 1), and the first is (4, 4, 1)"),
        ("error", "mylab.Mixed", "by Mixed: KeyError: 'no such scan' ("),
        ("labels", "mylab.Mixed", "by Mixed: labels must be whole numbers"),
    ],
)
def test_what_a_reader_does_wrong_is_one_line(
    mylab: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, file: str, format_: str, message: str
) -> None:
    (mylab / file).mkdir()
    words = ("ingest", file, "--format", format_, "--output", "set")
    code, output = command(monkeypatch, capfd, *words)
    assert code == 2
    assert message in output
    assert output.count("\n") == 1
    assert not (mylab / "set" / "dataset.json").exists()


def test_options_apply_to_a_reader_as_to_any_other(mylab: Path) -> None:
    (mylab / "scans").mkdir()
    for index in range(4):
        np.savetxt(mylab / "scans" / f"{index}.txt", np.full((6, 6), 50 * index), fmt="%d")
    source = open_source("scans", "mylab.Scans", size=3, channels=3, limit=3, without_label=0)
    (batch,) = source.batches()
    assert batch.images_NHWC.shape == (3, 3, 3, 3)
    assert batch.images_NHWC[:, 0, 0, 0].tolist() == [50, 100, 150]
    with pytest.raises(ConfigError, match=r"labels: format mylab.Scans brings its own"):
        open_source("scans", "mylab.Scans", labels="folders")
