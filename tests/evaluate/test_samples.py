"""Quality of samples: closed forms of a linear model with a quadratic f, and the same for any workers.

Shapes: B batch, P pixels, D latent width, K steps.
"""

import json
import math
from itertools import islice

import numpy as np
import pytest
import torch
from linear_toy import PIXELS, QuadraticEnergy, image_set, make_linear, transparent_model
from workers import together

from jebm.config import Config, Langevin
from jebm.core.model import JointModel, build_model
from jebm.data.loader import to_float, to_uint8
from jebm.errors import ConfigError
from jebm.evaluate.features.of_images import real_images
from jebm.evaluate.samples import prior_samples, sample_quality
from jebm.evaluate.share import ALONE, BATCH, Share
from jebm.evaluate.subject import Subject
from jebm.rng import gaussian_noise

PRECISION = 4.0
"""The prior of `narrow_model` is N(0, I / 4)."""


class Pixels:
    """Features that are the pixels themselves, so that distances are those of the images."""

    name = "pixels"
    dimension = PIXELS

    def __init__(self, sha256: str = "0a1b") -> None:
        self.sha256 = sha256

    def __call__(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW.flatten(1)


def narrow_model(latents: int = 6, scale: float = 0.4) -> JointModel:
    """Return x = scale * z on the first pixels, f = -3/2 |z|^2; q sees nothing."""
    model = transparent_model((latents,))
    make_linear(model, scale * torch.eye(PIXELS, latents))
    model.energy = QuadraticEnergy((PRECISION - 1) * torch.eye(latents))
    return model


def pictures(x_BCHW: torch.Tensor) -> np.ndarray:
    return to_uint8(x_BCHW).permute(0, 2, 3, 1).contiguous().numpy()


def exact_images(count: int, latents: int = 6, scale: float = 0.4) -> np.ndarray:
    """Return exact samples of `narrow_model`, as bytes."""
    z_BD = torch.randn(count, latents, generator=torch.Generator().manual_seed(5)) / math.sqrt(PRECISION)
    return pictures((scale * z_BD @ torch.eye(PIXELS, latents).T).view(-1, 1, 4, 4))


def chain_std(steps: int, step_size: float) -> float:
    """Return the standard deviation after K steps of the chain on N(0, 1 / PRECISION), from N(0, 1)."""
    keep = 1 - 0.5 * step_size**2 * PRECISION
    stationary = step_size**2 / (1 - keep**2)
    return math.sqrt(keep ** (2 * steps) * (1 - stationary) + stationary)


def quality(
    model: JointModel,
    images: np.ndarray,
    langevin: Langevin,
    *,
    count: int = 1000,
    factor: int = 20,
    share: Share = ALONE,
    gaussian: bool = False,
):
    config, known = Config(langevin=langevin), real_images(images, Pixels(), share=share)
    subject = Subject(model, config, image_set(images), samples=count, share=share, known=known)
    return sample_quality(subject, factor=factor, gaussian=gaussian)


def test_short_and_long_chains_are_as_far_from_the_truth_as_the_closed_form_says():
    """Between N(0, a^2 I) and N(0, b^2 I) the Fréchet distance is D (a - b)^2."""
    langevin = Langevin(steps=3, step_size=0.3)
    found = quality(narrow_model(), exact_images(3000), langevin, count=3000)
    for name, steps in (("samples", 3), ("samples_long", 60)):
        expected = 6 * (0.4 * (chain_std(steps, 0.3) - 0.5)) ** 2
        bias = (6 + 5) / 4 * 6 * (0.4 * 0.5) ** 2 * (2 / 3000)
        assert found[name]["steps"] == steps
        assert found[name]["frechet"] == pytest.approx(expected + bias, rel=0.1, abs=bias)
    assert found["samples"]["frechet"] > 20 * found["samples_long"]["frechet"]
    assert found["samples"]["kid"] > 10 * found["samples_long"]["kid"]
    assert found["samples_long"]["frechet"] < 2 * found["real_floor"]["frechet"]
    assert {(found[name]["n"], found[name]["n_real"]) for name in ("samples", "samples_long")} == {
        (3000, 3000)
    }
    assert (found["real_floor"]["n"], found["real_floor"]["n_real"]) == (1500, 1500)


def test_the_prior_is_compared_with_the_posterior_through_the_same_decoder():
    """q takes the pixels, 0.4 z, for z: the decoder writes 0.16 z of them, and 0.4 z of prior samples."""
    langevin, images = Langevin(steps=3, step_size=0.3), exact_images(1500)
    found = quality(narrow_model(), images, langevin, count=1500, gaussian=True)
    posterior = 0.4**2 * 0.5
    for name, std in (
        ("samples", 0.4 * chain_std(3, 0.3)),
        ("samples_long", 0.4 * chain_std(60, 0.3)),
        ("samples_gaussian", 0.4),
    ):
        to_posterior = found[f"{name}_to_posterior"]
        assert to_posterior["frechet"] == pytest.approx(6 * (std - posterior) ** 2, rel=0.1)
        assert to_posterior["kid"] > 0
        assert (to_posterior["n"], to_posterior["n_posterior"]) == (1500, 1500)
    assert found["samples_gaussian"]["frechet"] == pytest.approx(6 * (0.4 - 0.2) ** 2, rel=0.1)
    assert found["posterior_samples"]["frechet"] == pytest.approx(6 * (0.2 - posterior) ** 2, rel=0.1)
    assert found["samples_gaussian"]["steps"] == 0


def test_a_prior_that_is_the_posterior_is_at_no_distance_but_chance():
    """With z read as it was written, the aggregate posterior of images of the prior is the prior."""
    model = narrow_model()
    model.inference.weight_DP = model.inference.weight_DP / 0.4
    langevin = Langevin(steps=30, step_size=0.3)
    found = quality(model, exact_images(1500), langevin, count=1500, factor=1)
    close = found["samples_to_posterior"]
    assert close["frechet"] < 3 * found["real_floor"]["frechet"]
    assert abs(close["kid"]) < 5 * close["kid_standard_error"]


def test_a_model_that_reconstructs_exactly_is_at_no_distance():
    """Images are rounded to 8 bits as the real ones are: not even that is left."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (300, 4, 4, 1), np.uint8)
    found = quality(transparent_model((PIXELS,)), images, Langevin(), count=100)["reconstructions"]
    assert found["frechet"] < 1e-9
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert (found["n"], found["n_real"]) == (300, 300)


def test_samples_of_the_gaussian_prior_need_no_chain():
    found = quality(transparent_model((3, 3)), exact_images(300), Langevin(steps=10), count=300)
    assert found["samples"] == found["samples_long"]
    assert found["samples_to_posterior"] == found["samples_long_to_posterior"]
    assert found["samples"]["steps"] == 0


def test_the_result_says_in_which_features_it_was_taken_and_is_plain():
    found = quality(narrow_model(), exact_images(200), Langevin(steps=2), count=100, factor=2)
    assert found["features"] == {"name": "pixels", "dimension": 16, "sha256": "0a1b"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found == quality(narrow_model(), exact_images(200), Langevin(steps=2), count=100, factor=2)


def test_chains_that_leave_the_numbers_are_counted_not_hidden():
    """f = +25 |z|^2 with s = 1: |z| grows 25-fold with each step."""
    model = narrow_model()
    model.energy = QuadraticEnergy(-50 * torch.eye(6))
    found = quality(model, exact_images(200), Langevin(steps=2, step_size=1), count=100, factor=20)
    assert found["samples"]["not_finite"] == 0
    assert found["samples"]["frechet"] is not None
    assert found["samples_long"]["not_finite"] == 100
    assert {found["samples_long"][name] for name in ("frechet", "kid", "precision")} == {None}
    assert found["samples_long_to_posterior"]["frechet"] is None
    assert (found["samples_long"]["n"], found["samples_long"]["steps"]) == (100, 40)
    json.dumps(found, allow_nan=False)


# --- workers and positions


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_finds_the_same(workers):
    """The last batch is smaller; of three workers one has none of the samples."""
    images, langevin = exact_images(2 * BATCH + 7), Langevin(steps=3)
    alone = quality(narrow_model(), images, langevin, count=BATCH + 30, factor=3)

    def work(share: Share) -> dict:
        return quality(narrow_model(), images, langevin, count=BATCH + 30, factor=3, share=share)

    assert together(work, workers) == [alone] * workers


def test_workers_whose_classifiers_differ_do_not_mix_them():
    images = exact_images(3 * BATCH)

    def work(share: Share) -> str:
        with pytest.raises(ConfigError) as raised:
            real_images(images, Pixels("0a1b" if share.rank else "0a1c"), share=share)
        return str(raised.value)

    for message in together(work, 2):
        assert "evaluation.features: pixels is not the same net on all nodes" in message


def test_batches_cover_every_image_once():
    for images in (1, BATCH - 1, BATCH, 3 * BATCH + 1):
        ranges = sorted(
            (position, rows.start, rows.stop)
            for rank in range(3)
            for position, rows in Share(rank, 3).batches(images)
        )
        assert [position for position, _, _ in ranges] == list(range(math.ceil(images / BATCH)))
        assert [row for _, start, stop in ranges for row in range(start, stop)] == list(range(images))


def test_a_longer_chain_goes_on_where_the_shorter_one_ended():
    model, noise, step_size = narrow_model(latents=16, scale=1), gaussian_noise(3, 0), 0.3
    short, long = (
        next(prior_samples(model, Langevin(steps=steps, step_size=step_size), 40, noise)) for steps in (4, 9)
    )
    normal = noise(0, "evaluated prior samples")
    z_BD = normal(40, 16)
    for step in range(9):
        if step == 4:
            torch.testing.assert_close(short.flatten(1), z_BD)
        z_BD = z_BD - 0.5 * step_size**2 * PRECISION * z_BD + step_size * normal(40, 16)
    torch.testing.assert_close(long.flatten(1), z_BD)


def test_samples_differ_between_batches_and_seeds_and_are_made_as_they_are_asked_for():
    model, langevin = narrow_model(), Langevin(steps=2)
    first, second = islice(prior_samples(model, langevin, 10**9, gaussian_noise(0, 0)), 2)
    (other,) = islice(prior_samples(model, langevin, 10**9, gaussian_noise(1, 0)), 1)
    assert first.shape == (BATCH, 1, 4, 4)
    assert not first.requires_grad
    for a, b in ((first, second), (first, other)):
        assert (
            abs(float(torch.corrcoef(torch.stack([a[:, 0, 0].flatten(), b[:, 0, 0].flatten()]))[0, 1])) < 0.2
        )
    sizes = [len(x) for x in prior_samples(model, langevin, 2 * BATCH + 5, gaussian_noise(0, 0))]
    assert sizes == [BATCH, BATCH, 5]


def test_features_of_images_are_those_of_the_net_in_their_order():
    images = exact_images(2 * BATCH + 3)
    expected = to_float(images, "cpu").flatten(1)
    torch.testing.assert_close(real_images(images, Pixels()).features_NF, expected, rtol=0, atol=0)


def test_a_net_and_real_images_go_through(fashion_classifier, fashion_test):
    """The whole of it as an untrained model sees it: far above the floor, reconstructions too."""
    images = fashion_test.images_NHWC[:200]
    known = real_images(images, fashion_classifier)
    subject = Subject(
        build_model(Config()), Config(langevin=Langevin(steps=3)), fashion_test, samples=200, known=known
    )
    found = sample_quality(subject, factor=2)
    assert found["features"]["sha256"] == fashion_classifier.sha256
    for name in ("reconstructions", "samples", "samples_long"):
        assert found[name]["frechet"] > 3 * found["real_floor"]["frechet"]
        assert found[name]["kid"] > found["real_floor"]["kid"] + 1
