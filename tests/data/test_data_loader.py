"""A batch is a function of its position: of the seed and the step, and of nothing else."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from jebm.data.dataset import ImageSet, load_images
from jebm.data.loader import Loader, to_uint8
from jebm.data.shards import write_dataset
from jebm.data.source import source_from_arrays
from jebm.errors import ConfigError, DataError
from jebm.store.storage import open_store

IMAGES = 103


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Return a mapped set whose image n begins with the pixels n and n + 1."""
    directory: Path = tmp_path_factory.mktemp("loader")
    images_NHWC = np.random.default_rng(0).integers(0, 256, (IMAGES, 4, 6, 3), np.uint8)
    images_NHWC[:, 0, 0, 0], images_NHWC[:, 0, 1, 0] = np.arange(IMAGES), np.arange(IMAGES) + 1
    store = open_store(str(directory / "set"))
    write_dataset(source_from_arrays(images_NHWC, name="numbered"), store)
    return load_images(store, directory / "cache")


def loader(
    images: ImageSet, *, batch_size: int = 12, rank: int = 0, world_size: int = 1, seed: int = 1
) -> Loader:
    return Loader(images, batch_size=batch_size, rank=rank, world_size=world_size, seed=seed, device="cpu")


def numbers(x_BCHW: Tensor) -> list[int]:
    return [int(number) for number in to_uint8(x_BCHW)[:, 0, 0, 0]]


def test_pixels_are_those_of_the_set_between_minus_one_and_one(images: ImageSet) -> None:
    x_BCHW = loader(images).batch(0)
    assert x_BCHW.dtype == torch.float32
    assert x_BCHW.shape == (12, 3, 4, 6)
    assert x_BCHW.is_contiguous()
    pixels = images.images_NHWC[numbers(x_BCHW)].transpose(0, 3, 1, 2)
    expected = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    np.testing.assert_array_equal(x_BCHW.numpy(), expected)
    np.testing.assert_array_equal(to_uint8(x_BCHW).numpy(), pixels)


def test_to_uint8_is_the_inverse_and_clamps() -> None:
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([-3.0, -1.001, 0.0, 1.001, 7.0])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7, 12])
def test_the_ranks_together_hold_the_global_batch(images: ImageSet, world_size: int) -> None:
    alone = loader(images)
    ranks = [loader(images, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(rank.rows(0)) for rank in ranks} <= {12 // world_size, -(-12 // world_size)}
    for step in (0, 1, 7, 8, 20):
        assert torch.equal(torch.cat([rank.batch(step) for rank in ranks]), alone.batch(step))


def test_any_step_can_be_the_first(images: ImageSet) -> None:
    lived = loader(images)
    history = [lived.batch(step) for step in range(20)]
    for step in (19, 3, 8, 0):
        assert torch.equal(loader(images).batch(step), history[step])
        assert torch.equal(lived.batch(step), history[step])


def test_an_epoch_shows_an_image_at_most_once_and_all_when_it_divides(images: ImageSet) -> None:
    fitting = loader(images, batch_size=IMAGES)
    assert fitting.steps_per_epoch == 1
    assert sorted(numbers(fitting.batch(5))) == list(range(IMAGES))
    cut = loader(images)
    assert cut.steps_per_epoch == IMAGES // 12
    for epoch in range(3):
        steps = range(epoch * cut.steps_per_epoch, (epoch + 1) * cut.steps_per_epoch)
        seen = Counter(number for step in steps for number in numbers(cut.batch(step)))
        assert len(seen) == 12 * cut.steps_per_epoch
        assert set(seen.values()) == {1}


def test_epochs_and_seeds_have_orders_of_their_own(images: ImageSet) -> None:
    orders = {tuple(numbers(loader(images, batch_size=IMAGES).batch(epoch))) for epoch in range(4)}
    orders |= {tuple(numbers(loader(images, batch_size=IMAGES, seed=seed).batch(0))) for seed in (2, 3)}
    assert len(orders) == 6


def test_batches_that_cannot_be_are_refused(images: ImageSet) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size"):
        loader(images, batch_size=10, world_size=11)
    with pytest.raises(DataError, match=r"numbered.*103 images"):
        loader(replace(images), batch_size=104)
