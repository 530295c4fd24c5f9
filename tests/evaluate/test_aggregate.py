"""The aggregate posterior as prior, against closed forms."""

import math

import numpy as np
import pytest
import torch
from linear_toy import PIXELS, QuadraticEnergy, image_set, transparent_model
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from workers import together

from jebm.config import Config
from jebm.core.distributions import DiagGaussian, standard_log_density
from jebm.evaluate.aggregate import AggregatePosterior, Oracle, fit_aggregate, oracle, oracle_of
from jebm.evaluate.estimates import Estimate
from jebm.evaluate.share import ALONE, Share
from jebm.evaluate.subject import Sizes, Subject
from jebm.rng import generator

EXACT = Estimate(0.0, 0.0)


def normal(place: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(0, 0, place, "aggregate"))


def gain_of(prior: AggregatePosterior, z_MD: torch.Tensor) -> Oracle:
    gain_M = prior.log_density(z_MD) - standard_log_density(z_MD.double())
    return oracle_of(gain_M, torch.zeros(len(z_MD)), EXACT, prior)


@pytest.mark.parametrize("bandwidth", [0.0, 0.3, 1.0])
def test_the_density_is_that_of_the_smoothed_mixture(bandwidth):
    mean_ND, log_variance_ND = 2 * normal(0, 700, 5).double() + 1, 2 * normal(1, 700, 5).double() - 3
    centre_D, spread_D = mean_ND.mean(0), mean_ND.var(0, correction=0)
    mixture = MixtureSameFamily(
        Categorical(torch.ones(700, dtype=torch.float64)),
        Independent(
            Normal(
                centre_D + math.sqrt(1 - bandwidth**2) * (mean_ND - centre_D),
                (log_variance_ND.exp() + bandwidth**2 * spread_D).sqrt(),
            ),
            1,
        ),
    )
    z_MD = torch.cat([2 * normal(2, 3000, 5) + 1, 1000 * normal(3, 10, 5)]).double()  # also far from all
    found = AggregatePosterior(mean_ND, log_variance_ND, bandwidth).log_density(z_MD)
    torch.testing.assert_close(found, mixture.log_prob(z_MD), rtol=1e-9, atol=1e-8)


def test_it_integrates_to_one():
    prior = AggregatePosterior(normal(0, 40, 2).double(), normal(1, 40, 2).double() - 1, 0.2)
    grid = torch.linspace(-15, 15, 1001, dtype=torch.float64)
    z_MD = torch.cartesian_prod(grid, grid)
    assert float(prior.log_density(z_MD).exp().sum()) * 0.03**2 == pytest.approx(1, abs=1e-6)


def test_where_every_posterior_is_the_prior_there_is_nothing_to_gain():
    prior = fit_aggregate(torch.zeros(300, 6), torch.zeros(300, 6), normal(0, 100, 6))
    found = gain_of(prior, normal(1, 2000, 6))
    assert abs(found.gain.value) < 1e-12
    assert math.isnan(found.share.value)  # a share of nothing


def test_a_standard_normal_aggregate_of_narrow_posteriors_has_next_to_nothing_to_gain():
    """KL(q || N(0, I)) is zero, and a mixture of finitely many images only comes near it, from below."""
    mean_ND, log_variance_ND = math.sqrt(0.9) * normal(0, 5_000, 3), torch.full((5_000, 3), math.log(0.1))

    def codes(place: int, count: int) -> torch.Tensor:
        return math.sqrt(0.9) * normal(place, count, 3) + math.sqrt(0.1) * normal(place + 1, count, 3)

    found = gain_of(fit_aggregate(mean_ND, log_variance_ND, codes(1, 1000)), codes(3, 2000))
    assert -0.04 < found.gain.value < 3 * found.gain.standard_error


def test_the_gain_of_a_mixture_is_its_divergence_from_the_prior():
    """Four kinds of image, two coordinates, one of them idle: KL by quadrature."""
    kinds_K2 = torch.tensor([[-2.0, 0.0], [-0.5, 0.0], [0.7, 0.0], [1.5, 0.0]])
    variance_2 = torch.tensor([0.09, 1.0])

    def moments(place: int, count: int) -> DiagGaussian:
        kind_N = torch.randint(4, (count,), generator=generator(0, 0, place, "kinds"))
        return DiagGaussian(kinds_K2[kind_N], variance_2.log().expand(count, 2))

    check_MD = moments(1, 1000).rsample(normal(0, 1000, 2))
    prior = fit_aggregate(*moments(0, 2000), check_MD)
    found = gain_of(prior, moments(2, 4000).rsample(normal(1, 4000, 2)))
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    q = Normal(kinds_K2[:, 0].double(), 0.3).log_prob(grid[:, None]).logsumexp(1) - math.log(4)
    truth = torch.trapezoid(q.exp() * (q - Normal(0, 1).log_prob(grid)), grid)
    assert abs(found.gain.value - truth) < 4 * found.gain.standard_error + 0.01


def test_the_standard_error_of_the_share_is_what_repetition_shows():
    gain_RM = 3 + normal(0, 400, 500).double()
    f_RM = 0.8 * gain_RM + 0.5 + 0.3 * normal(1, 400, 500).double()
    prior = AggregatePosterior(torch.zeros(1, 1), torch.zeros(1, 1), 0.0)
    log_z_R = 1 + 0.02 * normal(2, 400).double()
    shares = [
        oracle_of(gain_M, f_M, Estimate(float(log_z), 0.02), prior).share
        for gain_M, f_M, log_z in zip(gain_RM, f_RM, log_z_R, strict=True)
    ]
    value_R, error_R = torch.tensor(shares).unbind(1)
    assert float(value_R.mean()) == pytest.approx((0.8 * 3 + 0.5 - 1) / 3, abs=0.003)
    assert float(error_R.mean()) == pytest.approx(float(value_R.std()), rel=0.15)


def subject_of_known_gain(share: Share = ALONE) -> Subject:
    """Pixels have variance 1/16, so q(z) = N(0, 5/16), and f = -(16/5 - 1) |z|^2 / 2 is its tilt."""

    def images(place: int, count: int):
        x_NP = (127.5 + 127.5 * 0.25 * normal(place, count, PIXELS)).round().clamp(0, 255)
        return image_set(x_NP.byte().numpy().reshape(count, 4, 4, 1))

    model = transparent_model((2,))  # reads z in the first two pixels
    model.inference.variance_D = torch.full((2,), 0.25)
    model.energy = QuadraticEnergy((16 / 5 - 1) * torch.eye(2))
    subject = Subject(model, Config(), images(1, 3000), share=share, sizes=Sizes(200, 50))
    subject.train = images(0, 5000)  # instead of reading data.train
    return subject


def found_of(subject: Subject) -> Oracle | None:
    return oracle(subject, subject.images_NHWC)


def test_a_tilt_that_is_the_aggregate_posterior_gains_all_there_is():
    found = found_of(subject_of_known_gain())
    assert found is not None
    truth = -math.log(5 / 16) + (5 / 16 - 1)  # KL in two dimensions
    assert abs(found.gain.value - truth) < 4 * found.gain.standard_error + 0.02
    assert found.share.value == pytest.approx(1, abs=0.06)
    assert together(lambda share: found_of(subject_of_known_gain(share)), 2) == [found, found]


def test_without_training_images_on_every_worker_nothing_is_known():
    def work(share: Share) -> Oracle | None:
        subject = subject_of_known_gain(share)
        if share.rank == 1:
            subject.train = image_set(np.zeros((0, 4, 4, 1), np.uint8))
        return found_of(subject)

    assert together(work, 2) == [None, None]
