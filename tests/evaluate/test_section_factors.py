"""The section on factors, of a model whose code is known: which layer tells which factor."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from linear_toy import PIXELS, image_set, transparent_model

from jebm.config import Config, config_to_dict
from jebm.data.dataset import ImageSet
from jebm.data.factors import Factor
from jebm.data.shards import write_dataset
from jebm.data.source import Source, source_from_arrays
from jebm.errors import ConfigError
from jebm.evaluate import section_factors
from jebm.evaluate.section_factors import factors_section
from jebm.evaluate.subject import Subject
from jebm.evaluate.suite import Request, check, measures_of
from jebm.report.findings import Measured
from jebm.store.checkpoint import Checkpoints, Facts
from jebm.store.storage import open_store

FACTORS = (Factor("low", tuple("abcd")), Factor("high", tuple("abc")), Factor("unseen", tuple("ab")))


def known(count: int, seed: int) -> ImageSet:
    """Return images of latents (2, 2): one of the first two tells `low`, one of the others `high`."""
    stream = np.random.default_rng(seed)
    factors_NF = stream.integers(0, [4, 3, 2], (count, 3)).astype(np.int32)
    x_NP = np.zeros((count, PIXELS))
    x_NP[:, :4] = stream.uniform(-0.5, 0.5, (count, 4))
    x_NP[:, 0] = factors_NF[:, 0] / 2 - 0.75
    x_NP[:, 2] = factors_NF[:, 1] / 2 - 0.5
    pixels = np.rint((x_NP + 1) * 127.5).astype(np.uint8).reshape(-1, 4, 4, 1)
    found = image_set(pixels)
    manifest = dataclasses.replace(found.manifest, factors=FACTORS, factors_sha256="0" * 64)
    return ImageSet(pixels, None, manifest, factors_NF)


def test_each_layer_tells_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(section_factors, "_UPDATES", 300)
    subject = Subject(transparent_model((2, 2)).eval(), Config(), known(4_000, 1))
    vars(subject)["train"] = known(2_000, 0)
    section = factors_section(subject)
    figures = {each.name: each.value for each in section.figures}
    # Each layer holds one of three factors, in one of its latents.
    for layer in ("z1", "z2"):
        assert figures[f"factors told, {layer}"] == pytest.approx(1 / 3, abs=0.02)
        assert figures[f"MIG, {layer}"] == pytest.approx(1 / 3, abs=0.01)
        assert figures[f"disentanglement, {layer}"] > 0.95
        assert figures[f"completeness, {layer}"] > 0.95
    accuracies, shares = section.tables
    assert accuracies.columns == ("factor", "categories", "most frequent", "z1", "z2")
    rows: dict[Any, Any] = {row[0]: row[1:] for row in accuracies.rows}
    truth = {"low": (4, 1.0, 0.25), "high": (3, 1 / 3, 1.0), "unseen": (2, 0.5, 0.5)}
    for name, (categories, first, second) in truth.items():
        assert rows[name][0] == categories
        assert isinstance(rows[name][2], Measured)
        assert rows[name][2].value == pytest.approx(first, abs=0.03)  # 4 standard errors of 4,000 images
        assert rows[name][3].value == pytest.approx(second, abs=0.03)
    told: dict[Any, Any] = {row[0]: row[1:] for row in shares.rows}
    assert told["low"] == pytest.approx((1, 0), abs=0.02)
    assert told["high"] == pytest.approx((0, 1), abs=0.02)


def test_paper_has_factors_where_the_data_do_and_asking_for_none_is_an_error(
    tmp_path: Path,
) -> None:
    assert "factors" not in measures_of(["paper"])
    assert "factors" in measures_of(["paper"], factors=True)
    bare, full = str(tmp_path / "bare"), str(tmp_path / "full")
    images = np.zeros((200, 28, 28, 1), np.uint8)
    plain = source_from_arrays(images, np.arange(200) % 10, name="toy")
    write_dataset(plain, open_store(bare))
    write_dataset(with_factors(plain), open_store(full))
    facts = Facts(
        step=8,
        attempt=1,
        world_size=1,
        config=config_to_dict(Config()),
        provenance={},
        metrics={},
        state={"data_sha256": "0"},
        parent=None,
    )
    Checkpoints(open_store(str(tmp_path)), "mine").save({"model.x": torch.zeros(1)}, facts)
    checkpoint = str(tmp_path / "mine")
    for train, data, suite, there in (
        (full, full, "paper", True),
        (bare, full, "paper", False),
        (full, bare, "paper", False),
    ):
        found = check(Request(checkpoint, (suite,), data=data, train=train))
        assert ("factors" in found.measures) == there
    assert "factors" in check(Request(checkpoint, ("factors",), data=full, train=full)).measures
    with pytest.raises(ConfigError, match=r"data: factors are needed.*--factors"):
        check(Request(checkpoint, ("factors",), data=bare, train=full))


def with_factors(source: Source) -> Source:
    def read() -> Any:
        for batch in source.read():
            yield dataclasses.replace(batch, factors_NF=np.zeros((len(batch.images_NHWC), 3), np.int32))

    return dataclasses.replace(source, factors=FACTORS, read=read)
