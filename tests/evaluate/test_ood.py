"""Scores against Gaussian closed forms; measures of separation against scikit-learn; t against SciPy."""

import math

import numpy as np
import pytest
import torch
from linear_toy import LinearInference, QuadraticEnergy, joint_model, make_linear
from scipy import stats
from sklearn import metrics

from jebm.config import Langevin
from jebm.core.energy import EnergyNet
from jebm.evaluate.likelihood import importance_weighted_bound
from jebm.evaluate.ood import (
    Detection,
    auroc,
    average_precision,
    detection,
    detections_by_label,
    fpr_at_tpr,
    log_marginal_tilt,
    scores,
)
from jebm.evaluate.statistics import t_interval
from jebm.rng import gaussian_noise

NOISE = gaussian_noise(seed=0, rank=0)
PIXELS, STD = 16, 0.5
COUPLING = torch.tensor([[0.2, 0.1, -0.4], [0.1, 0.3, 0.3], [-0.4, 0.3, 0.5]])
PRECISION = torch.eye(3) + COUPLING
LOG_Z = -0.5 * torch.logdet(PRECISION).item()


def gaussian_log_density(x, mean, covariance):
    return torch.distributions.MultivariateNormal(mean.double(), covariance.double()).log_prob(x.double())


# -------------------------------------------------------------------------------------- scores of an image


@pytest.fixture
def gaussian_model():
    """Latents (2, 1), prior N(0, (I + COUPLING)^-1), x = A z + 0.5 noise, and some q."""
    model = joint_model((2, 1), STD)
    normal = NOISE(0, "gaussian model")
    make_linear(model, 0.3 * normal(PIXELS, 3))
    variance = torch.tensor([0.2, 0.3, 0.25])
    model.inference = LinearInference(0.2 * normal(3, PIXELS), torch.tensor([0.1, 0.0, -0.2]), variance)
    model.energy = QuadraticEnergy(COUPLING)
    return model


def image(count=1):
    return NOISE(0, "image")(1, 1, 4, 4).repeat(count, 1, 1, 1)


def loadings(model):
    return model.generator.loadings_PD.detach()


def test_the_mean_score_of_an_image_is_the_expectation_in_closed_form(gaussian_model):
    """Expectations of quadratics: under q, and for L>1 under q(z_U|x) p(z_F|z_U) as the chain has it."""
    model, count, config = gaussian_model, 20_000, Langevin(80, 0.3)
    x = image(count)
    with torch.no_grad():
        found = scores(model, x, NOISE(0, "scores"), config, log_z=LOG_Z)
        q = model.inference(x[:1])
    m, v = q.mean_BD[0], q.log_variance_BD[0].exp()

    def expected_log_likelihood(mean, covariance):
        residual = (x[0].flatten() - loadings(model) @ mean).square().sum()
        spread = torch.trace(loadings(model) @ covariance @ loadings(model).T)
        return -(residual + spread) / (2 * STD**2)

    def expected_quadratic(matrix, mean, covariance):
        return -0.5 * (mean @ matrix @ mean + torch.trace(matrix @ covariance))

    constant = 0.5 * PIXELS * math.log(2 * math.pi * STD**2)
    log_likelihood = expected_log_likelihood(m, v.diag()) - constant
    f = expected_quadratic(COUPLING, m, v.diag())
    log_p0 = expected_quadratic(torch.eye(3), m, v.diag()) - 1.5 * math.log(2 * math.pi)
    entropy_D = 0.5 * (1 + math.log(2 * math.pi) + v.log())
    # L>1: z_F given z_U has mean B z_U, and the chain's covariance for its step size.
    inner = PRECISION[:2, :2]
    b = -torch.linalg.solve(inner, PRECISION[:2, 2:])
    chain = torch.linalg.inv(inner @ (torch.eye(2) - config.step_size**2 / 4 * inner))
    mean = torch.cat([b[:, 0] * m[2], m[2:]])
    lift = torch.cat([b, torch.ones(1, 1)])
    covariance = v[2] * lift @ lift.T + torch.block_diag(chain, torch.zeros(1, 1))
    upper_variance = torch.linalg.inv(PRECISION)[2, 2]
    log_upper = -0.5 * ((m[2] ** 2 + v[2]) / upper_variance + torch.log(2 * math.pi * upper_variance))
    elbo = log_likelihood + f + log_p0 - LOG_Z + entropy_D.sum()
    above = expected_log_likelihood(mean, covariance) - constant + log_upper + entropy_D[2]
    expected = {
        "log p(x, z)": log_likelihood + f + log_p0,
        "log p(x|z)": log_likelihood,
        "f": f,
        "log prior": f + log_p0 - LOG_Z,
        "ELBO": elbo,
        "L>1": above,
        "-LLR>1": above - elbo,
    }
    assert set(found) == set(expected)
    for name, value in found.items():
        error = value.std().item() / math.sqrt(count)
        assert error < 0.1
        # 0.005: what 64 draws of the marginal take from its logarithm.
        assert value.mean().item() == pytest.approx(expected[name].item(), abs=5 * error + 0.005), name


def test_importance_weighted_bounds_reach_the_evidence(gaussian_model):
    """log p(x) = log N(x; 0, A (I + M)^-1 A' + sigma^2 I): what both bounds tend to with many draws."""
    model = gaussian_model
    a = loadings(model).double()
    posterior = torch.linalg.inv(a.T @ a / STD**2 + PRECISION)  # q: its mean, and wider than its variances
    weight, variance = posterior @ a.T / STD**2, 1.5 * posterior.diagonal()
    model.inference = LinearInference(weight.float(), torch.zeros(3), variance.float())
    covariance = a @ torch.linalg.inv(PRECISION.double()) @ a.T + STD**2 * torch.eye(PIXELS)
    z = NOISE(0, "z")(4, 3)
    x = (z @ loadings(model).T + STD * NOISE(0, "x")(4, PIXELS)).view(4, 1, 4, 4)
    log_evidence = gaussian_log_density(x.flatten(1), torch.zeros(PIXELS), covariance)
    repeated, config = x.repeat(400, 1, 1, 1), Langevin(60, 0.3)
    found = scores(model, repeated, NOISE(0, "scores"), config, log_z=LOG_Z, samples=6)
    for name, allowed in (("ELBO", 0.1), ("L>1", 0.3)):  # exp of the bounds has the evidence as its mean
        bound = found[name].view(400, 4).logsumexp(0) - math.log(400)
        torch.testing.assert_close(bound, log_evidence, rtol=0, atol=allowed)
    one = scores(model, repeated, NOISE(0, "scores"), config, log_z=LOG_Z)
    assert one["L>1"].mean() < log_evidence.mean() - 1  # a single draw from the prior is far below
    for name in ("log p(x, z)", "log p(x|z)", "f", "log prior"):  # means over the draws
        difference = found[name] - one[name]
        assert difference.mean().abs() < 5 * difference.std() / math.sqrt(len(difference)), name


def test_with_the_true_posterior_every_bound_is_the_evidence_whatever_the_draw():
    """f = a.z makes the prior N(a, I), log Z = |a|^2 / 2; orthogonal loadings make the posterior diagonal.

    The bottom layer has no part in x or f, so that drawing it from the prior costs nothing: LLR = 0.
    """
    model = joint_model((2, 1, 1), STD, width=4, depth=1, spectral_norm=False, output_scale=2.0)
    shift = torch.tensor([0.0, 0.0, 0.7, -1.1])
    set_linear_f(model.energy, shift)
    orthogonal, _ = torch.linalg.qr(NOISE(0, "loadings")(PIXELS, 4))
    a = orthogonal * torch.tensor([0.0, 0.0, 1.5, 0.8])
    make_linear(model, a)
    variance = 1 / (1 + a.square().sum(0) / STD**2)
    model.inference = LinearInference(variance[:, None] * a.T / STD**2, variance * shift, variance)
    x = 2 * NOISE(0, "x")(10, 1, 4, 4)
    covariance = a @ a.T + STD**2 * torch.eye(PIXELS)
    log_evidence = gaussian_log_density(x.flatten(1), a @ shift, covariance)
    log_z = shift.square().sum().item() / 2
    found = scores(model, x, NOISE(0, "scores"), Langevin(5, 0.4), log_z=log_z, samples=2)
    for name in ("ELBO", "L>1"):
        torch.testing.assert_close(found[name], log_evidence, rtol=0, atol=1e-4)
    torch.testing.assert_close(found["-LLR>1"], torch.zeros(10, dtype=torch.float64), rtol=0, atol=1e-4)
    assert (found["-LLR>2"] < -1).any()  # the middle layer has a part in x


def set_linear_f(energy: EnergyNet, a: torch.Tensor) -> None:
    """Make f(z) = a.z exactly: leaky(t) - leaky(-t) = 1.2 t with slope 0.2. Needs depth 1."""
    first, last = energy.linears
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.zero_()
        first.weight[0], first.weight[1] = a, -a
        last.weight[0, :2] = torch.tensor([1.0, -1.0]) / (1.2 * energy.output_scale)


def test_the_elbo_is_that_of_the_likelihood_module(gaussian_model):
    x = NOISE(0, "x")(5, 1, 4, 4)
    found = scores(gaussian_model, x, NOISE(0, "scores"), Langevin(2), log_z=0.3)
    one_draw = importance_weighted_bound(gaussian_model, x, NOISE(0, "scores"), 0.3, samples=1)
    torch.testing.assert_close(found["ELBO"], one_draw, rtol=0, atol=1e-4)


def test_the_gaussian_prior_has_no_f_and_a_marginal_in_closed_form():
    model = joint_model((2, 1), STD)
    x = NOISE(0, "x")(5, 1, 4, 4)
    found = scores(model, x, NOISE(0, "scores"), Langevin(), log_z=0.0)
    assert found["f"].abs().max() == 0
    with torch.no_grad():
        normal = NOISE(0, "scores")
        q = model.inference(x)
        z = q.rsample(normal(5, 3))
        lower = torch.cat([normal(5, 2), z[:, 2:]], 1)
        likelihood = torch.distributions.Normal(model.decode(lower), STD).log_prob(x).sum((1, 2, 3))
        standard = torch.distributions.Normal(0, 1).log_prob(z[:, 2])
        expected = likelihood + standard - q.log_density(z)[:, 2]
    torch.testing.assert_close(found["L>1"], expected.double(), rtol=0, atol=1e-4)


def test_scores_depend_on_the_position_and_nothing_else():
    model = joint_model((2, 1), STD, width=8)
    x = NOISE(0, "x")(6, 1, 4, 4)

    def at(position):
        torch.randn(3)  # the global generator does not matter
        return scores(model, x, NOISE(position, "scores"), Langevin(5, 0.4), log_z=0.0)

    first, again, other = at(1), at(1), at(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("columns", [[0, 1], [2], [1]])
def test_the_marginal_of_a_gaussian_prior_is_its_own(columns):
    z = 1.2 * NOISE(0, "z")(200, 3)
    tilt = log_marginal_tilt(QuadraticEnergy(COUPLING), z, columns, NOISE(0, "marginal"), 1000)
    rest = [column for column in range(3) if column not in columns]
    covariance = torch.linalg.inv(PRECISION)[rest][:, rest]
    log_p = gaussian_log_density(z[:, rest], torch.zeros(len(rest)), covariance)
    log_p0 = gaussian_log_density(z[:, rest], torch.zeros(len(rest)), torch.eye(len(rest)))
    off = tilt.log_mean_B + log_p0 - LOG_Z - log_p
    error = ((1 / tilt.effective_share_B - 1) / 1000).sqrt()
    assert error.max() < 0.05
    assert (off.abs() < 5 * error).all()
    assert 0.5 < (off / error).std() < 1.3  # a third of the draws from each part is better than chance


@pytest.mark.parametrize("steepness", [0.0, 1.5, 20.0])
def test_a_steep_linear_tilt_is_found_and_its_effective_share_is_known(steepness):
    """f = a z: log E[exp f] = a^2 / 2. With p = N(a, 1), 1 / share is int p^2 / mixture, (p0 + 2 p) / 3."""
    z = NOISE(0, "z")(50, 2)
    found = log_marginal_tilt(lambda z: steepness * z[:, 0], z, [0], NOISE(0, "marginal"), 3000)
    axis = torch.linspace(-10, 30, 40_001, dtype=torch.float64)
    p, p0 = (torch.exp(-0.5 * (axis - mean) ** 2) / math.sqrt(2 * math.pi) for mean in (steepness, 0.0))
    share = 1 / torch.trapezoid(p**2 / ((p0 + 2 * p) / 3), axis).item()
    assert found.effective_share_B.mean().item() == pytest.approx(share, abs=0.01)
    torch.testing.assert_close(
        found.log_mean_B, torch.full((50,), steepness**2 / 2, dtype=torch.float64), rtol=0, atol=0.07
    )


@pytest.mark.parametrize("samples", [1, 2, 32])
def test_a_constant_tilt_needs_one_draw(samples):
    found = log_marginal_tilt(lambda z: z.sum(1) * 0 + 7, torch.ones(3, 2), [0, 1], NOISE(0, "x"), samples)
    torch.testing.assert_close(found.log_mean_B, torch.full_like(found.log_mean_B, 7), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.effective_share_B, torch.ones_like(found.log_mean_B), rtol=0, atol=1e-4)


@pytest.mark.parametrize("samples", [2, 4])
def test_the_mean_of_a_few_draws_is_unbiased(samples):
    """Also where the parts of the mixture cannot have the same number of draws, or some have none."""
    z = torch.tensor([[3.0, 1.5]]).repeat(100_000, 1)
    found = log_marginal_tilt(lambda z: 0.8 * z[:, 0] * z[:, 1], z, [0], NOISE(0, "marginal"), samples)
    ratio = (found.log_mean_B - (0.8 * 1.5) ** 2 / 2).exp()
    assert ratio.mean().item() == pytest.approx(1, abs=5 * ratio.std().item() / math.sqrt(100_000))


# ------------------------------------------------------------------------------------ how well they separate


def tied_scores(seed):
    """Two sets of different sizes whose values coincide often."""
    random = np.random.default_rng(seed)
    n, m = random.integers(1, 60, 2)
    grain = [1.0, 3.0, 1e9][seed % 3]
    positive = np.round(random.normal(0.7, 1, n) * grain) / grain
    negative = np.round(random.normal(0.0, 1, m) * grain) / grain
    return positive, negative


def as_sklearn(positive, negative):
    return np.r_[np.ones(len(positive)), np.zeros(len(negative))], np.r_[positive, negative]


@pytest.mark.parametrize("seed", range(30))
def test_measures_equal_those_of_scikit_learn(seed):
    positive, negative = tied_scores(seed)
    truth, score = as_sklearn(positive, negative)
    sides = torch.from_numpy(positive), torch.from_numpy(negative)
    assert auroc(*sides) == pytest.approx(metrics.roc_auc_score(truth, score), abs=1e-12)
    assert average_precision(*sides) == pytest.approx(
        metrics.average_precision_score(truth, score), abs=1e-12
    )
    fpr, tpr, _ = metrics.roc_curve(truth, score, drop_intermediate=False)
    for level in (0.8, 0.95, 1.0):
        assert fpr_at_tpr(*sides, level) == pytest.approx(fpr[np.argmax(tpr >= level)], abs=1e-12)


def test_positives_are_weighted_to_a_share_as_if_they_were_repeated():
    positive, negative = NOISE(0, "positive")(30) + 0.5, NOISE(0, "negative")(90).round(decimals=1)
    plain = average_precision(positive, negative)
    assert average_precision(positive, negative, share=30 / 120) == pytest.approx(plain)
    assert average_precision(positive, negative, share=60 / 150) == pytest.approx(
        average_precision(positive.repeat(2), negative)
    )
    assert average_precision(positive, negative, share=0.1) < plain


def test_many_images_and_infinite_scores():
    random = np.random.default_rng(0)
    positive, negative = random.normal(0.5, 1, 100_000), random.normal(0, 1, 200_000)
    truth, score = as_sklearn(positive, negative)
    sides = torch.from_numpy(positive), torch.from_numpy(negative)
    assert auroc(*sides) == pytest.approx(metrics.roc_auc_score(truth, score), abs=1e-12)
    assert auroc(*sides) == pytest.approx(0.5 * (1 + math.erf(0.25)), abs=0.005)  # Phi(0.5 / sqrt 2)
    infinite = torch.tensor([math.inf, math.inf, 0]), torch.tensor([math.inf, -math.inf])
    assert auroc(*infinite) == pytest.approx((0.5 + 0.5 + 0 + 3) / 6)


def test_measures_of_known_cases():
    low, high = torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5])
    assert (auroc(high, low), average_precision(high, low), fpr_at_tpr(high, low, 0.95)) == (1, 1, 0)
    assert (auroc(low, high), fpr_at_tpr(low, high, 0.8)) == (0, 1)
    same = torch.zeros(3), torch.zeros(7)
    assert (auroc(*same), average_precision(*same), fpr_at_tpr(*same, 0.8)) == (0.5, 0.3, 1)
    for side in (torch.empty(0), torch.tensor([0.0, math.nan])):
        assert all(math.isnan(measure) for measure in detection(side, high))
        assert all(math.isnan(measure) for measure in detection(high, side))


# ---------------------------------------------------------------------------------------------- the protocol


def test_low_scores_are_anomalies():
    normal, anomalous = torch.tensor([1.0, 2, 3, 4]), torch.tensor([-1.0, 1.5])
    assert detection(normal, anomalous) == Detection(7 / 8, (1 + 2 / 3) / 2, 0.25, 0.25)


def test_one_class_is_the_anomaly_and_images_without_label_are_left_out():
    labels = torch.tensor([0, 1, 7, -1, 7, 2])
    values = {"score": torch.tensor([3.0, 2, 1, 0, 2.5, 4]), "other": torch.zeros(6)}
    found = detections_by_label(values, labels, anomalous=7)
    assert found["score"] == detection(torch.tensor([3.0, 2, 4]), torch.tensor([1.0, 2.5]))
    assert found["other"].auroc == 0.5


def test_the_quantile_of_student_t_for_every_number_of_seeds():
    assert t_interval([3.0]) == (3.0, math.inf)
    for count in [*range(2, 33), 101]:
        values = [float(value) for value in range(count)]
        expected = stats.t.ppf(0.975, count - 1) * stats.sem(values)
        assert t_interval(values).half_width == pytest.approx(expected, rel=1e-9)
