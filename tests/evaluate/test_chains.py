"""Chains and their diagnoses on densities known in closed form, and against another implementation."""

import math

import numpy as np
import pytest
import torch
from arviz_stats.base import array_stats

from jebm.config import Energy, Langevin
from jebm.core.energy import EnergyNet
from jebm.core.langevin import langevin, score_of
from jebm.evaluate.chains import (
    ChainReport,
    Tilt,
    chain_report,
    log_uniform,
    long_chains,
    run_chains,
    value_and_gradient,
    warnings_of,
)
from jebm.evaluate.estimates import Estimate
from jebm.evaluate.mixing import bulk_effective_sample_size, rank_normalised_split_r_hat
from jebm.evaluate.starts import Starts, compare_starts, warnings_of_starts
from jebm.rng import gaussian_noise

NOISE = gaussian_noise(seed=0, rank=0)


def identity(z):
    return z


def flat(z):
    return 0 * z.sum(1)


def quadratic(strength):
    """The prior is then N(0, I / (1 + strength))."""
    return lambda z: -0.5 * strength * z.square().sum(1)


def report_of(f, start, normal, config: Langevin, *, factor: int) -> ChainReport:
    return chain_report(long_chains(f, start, normal, config, factor=factor), config)


def energy_net(dim: int = 2, width: int = 16, output_scale: float = 4.0) -> EnergyNet:
    torch.manual_seed(3)
    return EnergyNet(dim, Energy(width=width, output_scale=output_scale)).requires_grad_(requires_grad=False)


def test_log_uniform_is_the_logarithm_of_a_uniform_number():
    ordered = log_uniform(NOISE(0, "u"), 20_000).double().exp().sort().values
    levels = torch.arange(1, 20_001) / 20_000
    assert (ordered - levels).abs().max() < 1.95 / math.sqrt(20_000)  # Kolmogorov-Smirnov, p = 0.001


@pytest.mark.parametrize("latents", [identity, lambda e: torch.tanh(e) + 2 * e])
def test_a_tilt_is_f_of_the_latents_with_its_gradient(latents):
    energy = energy_net(dim=3)
    z = 2 * NOISE(0, "z")(40, 3)
    tilt = Tilt(energy, latents)

    def f(e):
        return energy(latents(e))

    torch.testing.assert_close(tilt(z), f(z))
    torch.testing.assert_close(value_and_gradient(tilt)(z), (f(z), score_of(f)(z)))
    torch.testing.assert_close(value_and_gradient(f)(z), (f(z), score_of(f)(z)))


def test_chains_are_those_of_training():
    tilt, start = Tilt(energy_net(), identity), NOISE(0, "start")(50, 2)
    trace = run_chains(tilt, start, NOISE(0, "chain"), steps=30, step_size=0.4, every=30)
    score = score_of(lambda z: tilt(z) - 0.5 * z.square().sum(1))
    z, _ = langevin(score, start, NOISE(0, "chain"), steps=30, step_size=0.4)
    torch.testing.assert_close(trace.z_TBD[-1], z, rtol=1e-4, atol=1e-5)


def test_a_trace_holds_what_was_passed():
    tilt, start = Tilt(energy_net(), identity), NOISE(0, "start")(20, 2)
    traces = [
        run_chains(tilt, start, NOISE(0, "chain"), steps=12, step_size=0.3, every=every) for every in (1, 4)
    ]
    assert traces[1].steps == [0, 4, 8, 12]
    assert torch.equal(traces[0].z_TBD[0], start)
    for fine, coarse in zip(traces[0][1:4], traces[1][1:4], strict=True):
        assert torch.equal(fine[::4], coarse)
    z = traces[1].z_TBD[2]
    torch.testing.assert_close(traces[1].f_TB[2], tilt(z))
    score = score_of(lambda z: tilt(z) - 0.5 * z.square().sum(1))(z)
    torch.testing.assert_close(traces[1].gradient_norm_TB[2], score.norm(dim=1))


def acceptance_on_a_normal(step_size: float) -> float:
    """By quadrature over z and z' of the stationary unadjusted chain on N(0, 1).

    There p(z') q(z|z') / p(z) q(z'|z) = exp(-s^2/8 (z'^2 - z^2)), by inserting the three normal densities.
    """
    axis = np.linspace(-9, 9, 1801)
    z, noise = np.meshgrid(axis / math.sqrt(1 - step_size**2 / 4), axis, indexing="ij")
    weight = np.exp(-0.5 * (axis[:, None] ** 2 + axis[None, :] ** 2))
    new = (1 - step_size**2 / 2) * z + step_size * noise
    ratio = np.exp(np.minimum(0, -(step_size**2) / 8 * (new**2 - z**2)))
    return float((ratio * weight).sum() / weight.sum())


@pytest.mark.parametrize("step_size", [0.4, 0.9, 1.5])
def test_acceptance_of_the_unadjusted_chain_on_a_normal(step_size):
    start = NOISE(1, "start")(40_000, 1) / math.sqrt(1 - step_size**2 / 4)
    trace = run_chains(flat, start, NOISE(1, "chain"), steps=4, step_size=step_size, every=4)
    assert trace.acceptance == pytest.approx(acceptance_on_a_normal(step_size), abs=5 * 0.2 / math.sqrt(4e4))


def test_acceptance_goes_to_one_with_the_step():
    tilt, start = Tilt(energy_net(dim=4, output_scale=8.0), identity), NOISE(2, "start")(500, 4)
    acceptances = [
        run_chains(tilt, start, NOISE(2, "chain"), steps=40, step_size=s, every=40).acceptance
        for s in (1.6, 0.8, 0.4, 0.1, 0.02)
    ]
    assert acceptances == sorted(acceptances)
    assert acceptances[0] < 0.7
    assert acceptances[-1] > 0.999


@pytest.mark.parametrize("corrected", [False, True])
def test_a_corrected_chain_has_the_variance_of_the_prior(corrected):
    strength, step_size, count = 3.0, 0.7, 40_000
    start = NOISE(3, "start")(count, 2)
    trace = run_chains(
        quadratic(strength),
        start,
        NOISE(3, "chain"),
        steps=60,
        step_size=step_size,
        every=60,
        corrected=corrected,
    )
    exact = 1 / (1 + strength)
    unadjusted = exact / (1 - step_size**2 * (1 + strength) / 4)
    expected = exact if corrected else unadjusted
    assert unadjusted > 1.9 * exact
    assert trace.z_TBD[-1].var().item() == pytest.approx(expected, rel=5 / math.sqrt(count))
    # Rejection must leave the whole state as it was, f and its gradient included.
    assert torch.equal(trace.f_TB[-1], quadratic(strength)(trace.z_TBD[-1]))
    score_B = (1 + strength) * trace.z_TBD[-1].norm(dim=1)
    torch.testing.assert_close(trace.gradient_norm_TB[-1], score_B)


def autoregression(correlation: float, draws: int, chains: int, purpose: str = "ar") -> torch.Tensor:
    """A stationary AR(1) of unit variance, (T, B), float64."""
    normal = NOISE(0, f"{purpose} {correlation}")
    values = [normal(chains).double()]
    for _ in range(draws - 1):
        values.append(correlation * values[-1] + math.sqrt(1 - correlation**2) * normal(chains).double())
    return torch.stack(values)


def by_arviz(draws_TBC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    columns = [column.T.numpy() for column in draws_TBC.double().unbind(2)]
    axes = {"chain_axis": 0, "draw_axis": 1}
    r_hat = [float(array_stats.rhat(c, method="rank", **axes)) for c in columns]
    effective = [float(array_stats.ess(c, method="bulk", **axes)) for c in columns]
    return torch.tensor(r_hat, dtype=torch.float64), torch.tensor(effective, dtype=torch.float64)


@pytest.mark.parametrize(("draws", "chains"), [(8, 3), (9, 200), (100, 4), (101, 4), (600, 2)])
def test_r_hat_and_effective_sample_size_are_those_of_arviz(draws, chains):
    wandering = autoregression(0.95, draws, chains)
    columns = [
        autoregression(0.0, draws, chains),
        autoregression(0.7, draws, chains),
        autoregression(-0.6, draws, chains),
        wandering,
        wandering + torch.arange(chains),  # chains that disagree on the location
        wandering * torch.linspace(0.5, 3, chains),  # and on the scale
        wandering + torch.linspace(0, 3, draws)[:, None],  # and over time
        (2 * wandering).round(),  # ties, as where proposals were refused
        wandering.exp().exp(),  # ranks do not mind
    ]
    draws_TBC = torch.stack(columns, 2)
    r_hat_C, effective_C = by_arviz(draws_TBC)
    torch.testing.assert_close(rank_normalised_split_r_hat(draws_TBC), r_hat_C, rtol=1e-9, atol=0)
    torch.testing.assert_close(bulk_effective_sample_size(draws_TBC), effective_C, rtol=1e-6, atol=0)


@pytest.mark.parametrize("correlation", [-0.4, 0.0, 0.5, 0.9])
def test_the_effective_sample_size_of_an_autoregression(correlation):
    draws = autoregression(correlation, 2000, 20)
    exact = draws.numel() * (1 - correlation) / (1 + correlation)
    assert bulk_effective_sample_size(draws[:, :, None]).item() == pytest.approx(exact, rel=0.1)
    assert rank_normalised_split_r_hat(draws[:, :, None]).item() < 1.02


def test_what_is_constant_is_known_and_what_is_not_a_number_is_not():
    draws = autoregression(0.0, 20, 4)
    broken = draws.clone()
    broken[3, 2] = math.nan
    columns = torch.stack([torch.full_like(draws, 7.0), broken, draws], 2)
    r_hat, effective = rank_normalised_split_r_hat(columns), bulk_effective_sample_size(columns)
    assert r_hat[0] == 1
    assert effective[0] == 80
    assert r_hat.isnan().tolist() == effective.isnan().tolist() == [False, True, False]
    assert rank_normalised_split_r_hat(columns[:3]).isnan().all()
    assert bulk_effective_sample_size(columns[:7]).isnan().all()


def test_a_report_of_chains_on_a_shifted_normal():
    """With f = a.z and start N(0, I): E f after k steps = |a|^2 (1 - (1 - s^2/2)^k), for every k."""
    a, s, steps, factor = torch.tensor([0.6, -0.8, 2.0]), 0.2, 30, 6
    report = report_of(
        lambda z: z @ a, NOISE(4, "start")(4000, 3), NOISE(4, "chain"), Langevin(steps, s), factor=factor
    )
    length = a.norm().item()

    def mean_f(k):
        return length**2 * (1 - (1 - s**2 / 2) ** k)

    error = length * math.sqrt(1 / (1 - s**2 / 4) / 4000)
    assert (report.steps, report.long_steps, report.chains, report.step_size) == (30, 180, 4000, s)
    assert [point.step for point in report.trace] == list(range(0, 181, 10))
    for point in report.trace:
        assert point.f == pytest.approx(mean_f(point.step), abs=5 * error)
    drift = mean_f(180) - mean_f(30)
    assert drift > 1
    assert report.f_drift.value == pytest.approx(drift, abs=5 * report.f_drift.standard_error)
    # Var f(z_180) + Var f(z_30) - 2 Cov, the covariance being (1 - s^2/2)^150 of the variance.
    kept = (1 - s**2 / 2) ** 150
    assert report.f_drift.standard_error == pytest.approx(error * math.sqrt(2 - 2 * kept), rel=0.1)
    assert report.start_left == pytest.approx((1 - s**2 / 2) ** 30)
    assert report.stationary_variance == pytest.approx(1 / (1 - s**2 / 4))
    assert report.gaussian_norm == pytest.approx(
        NOISE(5, "norm")(100_000, 3).norm(dim=1).mean().item(), rel=0.01
    )
    start_norm = report.trace[0].norm
    assert start_norm == pytest.approx(report.gaussian_norm, rel=0.05)
    shifted = (NOISE(5, "norm")(100_000, 3) + (1 - (1 - s**2 / 2) ** 180) * a).norm(dim=1).mean().item()
    assert report.trace[-1].norm == pytest.approx(shifted, rel=0.05)
    assert report.norm_drift.value == pytest.approx(report.trace[-1].norm - report.trace[3].norm, abs=1e-4)
    assert report.f_r_hat > 1.1  # it still moves after 30 steps
    assert report.z_r_hat > report.f_r_hat - 0.02  # the worst coordinate is no better


def test_a_report_records_at_the_steps_that_it_compares():
    one, two = (
        report_of(flat, NOISE(0, "start")(8, 2), NOISE(0, "chain"), Langevin(29, 0.4), factor=factor)
        for factor in (1, 2)
    )
    assert [point.step for point in two.trace] == list(range(59))
    assert one.norm_drift == Estimate(0.0, 0.0)
    assert math.isnan(one.z_r_hat)
    assert math.isnan(one.z_effective_samples)
    assert warnings_of(one) == []  # what is not known is no fault


@pytest.fixture(scope="module")
def good():
    """What training does by default, on a flat f in 14 dimensions."""
    return report_of(flat, NOISE(6, "start")(200, 14), NOISE(6, "chain"), Langevin(40, 0.4), factor=10)


def test_no_warning_without_a_reason(good):
    assert warnings_of(good) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"acceptance": 0.79}, "a Metropolis check would take only 79% of the steps"),
        ({"stationary_variance": 1.11}, "widens a unit variance to 1.11"),
        ({"start_left": 0.11}, "leave 0.11 of the start"),
        ({"f_drift": Estimate(-0.5, 0.1)}, "mean f goes from 0.50 after 40 steps to 0.00 after 400"),
        ({"f_r_hat": 1.11}, "R-hat is 1.110"),
        ({"z_r_hat": 1.11}, "R-hat is 1.110"),
        ({"z_effective_samples": 399.0}, "only 399 independent samples"),
        ({"gaussian_norm": 2.0}, "|z| is 3.69"),
    ],
)
def test_each_fault_has_a_line(good, change, complaint):
    (line,) = warnings_of(good._replace(**change))
    assert complaint in line


@pytest.mark.parametrize(
    "change",
    [{"acceptance": 0.81}, {"start_left": 0.09}, {"f_drift": Estimate(0.49, 0.1)}, {"z_r_hat": 1.09}],
)
def test_what_is_within_the_gates_has_none(good, change):
    assert warnings_of(good._replace(**change)) == []


def two_wells(z):
    """The prior is two narrow normals, far from one another."""
    centre = torch.tensor([4.0, 0.0])
    ways = torch.stack([-4 * (z - centre).square().sum(1), -4 * (z + centre).square().sum(1)])
    return ways.logsumexp(0) + 0.5 * z.square().sum(1)


@pytest.mark.parametrize(
    ("f", "config", "complaints"),
    [
        (
            lambda z: 3 * z[:, 0],
            Langevin(40, 0.1),
            ["leave 0.82 of the start", "mean f goes from", "|z| is", "R-hat is", "independent samples"],
        ),
        (quadratic(24), Langevin(40, 0.35), ["a Metropolis check would take only"]),
        (lambda z: 0.4 * z.square().sum(1), Langevin(400, 0.4), ["|z| is"]),
        (two_wells, Langevin(60, 0.3), ["|z| is", "R-hat is", "independent samples"]),
        (quadratic(100), Langevin(50, 0.4), ["the chains diverged within 500 steps"]),
    ],
)
def test_chains_that_are_not_valid_are_seen(f, config, complaints):
    report = report_of(f, NOISE(7, "start")(200, 2), NOISE(7, "chain"), config, factor=10)
    lines = warnings_of(report)
    assert len(lines) == len(complaints), lines
    for line, complaint in zip(lines, complaints, strict=True):
        assert complaint in line


# --- both kinds of start


def both(f, posterior, config: Langevin) -> Starts:
    """Chains from N(0, I) and from these samples."""
    starts = (NOISE(8, "start")(len(posterior), posterior.shape[1]), posterior)
    traces = [long_chains(f, start, NOISE(i, "chain"), config, factor=10) for i, start in enumerate(starts)]
    return compare_starts(*traces, config)


def planted(z):
    """The prior is a mixture of N(0, I) and N(10 e1, I), and almost all of it is the second."""
    return torch.nn.functional.softplus(10 * z[:, 0] - 43)


def test_a_mode_that_only_chains_from_the_posterior_know_is_warned_of():
    """Within N(0, I), f = 0; within the mode 100 - 43 = 57. Neither set of chains finds fault with itself."""
    posterior = NOISE(9, "posterior")(200, 14)
    posterior[:, 0] += 10
    found = both(planted, posterior, Langevin(40, 0.4))
    assert warnings_of(found.from_prior) == []
    assert found.f_gap.value == pytest.approx(57, abs=5 * found.f_gap.standard_error)
    assert found.z_r_hat > 1.5
    assert max(found.from_prior.z_r_hat, found.from_posterior.z_r_hat) < 1.1
    gap, r_hat = (line for line in warnings_of_starts(found) if line.startswith("from both: "))
    assert f"{found.f_gap.value:.2f} ± {found.f_gap.standard_error:.2f} nats above chains from N(0, I)" in gap
    assert f"R-hat is {max(found.f_r_hat, found.z_r_hat):.3f} over the chains" in r_hat


def test_a_start_that_is_forgotten_is_not_warned_of():
    """With f = a.z all chains end in N(a, I), but for the step's bias, wherever they start."""
    shift = torch.tensor([0.8, 0.0, -0.5])
    found = both(lambda z: z @ shift, 3 + 0.1 * NOISE(9, "posterior")(200, 3), Langevin(40, 0.4))
    assert warnings_of_starts(found) == []
    assert abs(found.f_gap.value) < 4 * found.f_gap.standard_error
    assert found.f_gap.standard_error < 0.1
    assert max(found.f_r_hat, found.z_r_hat) < 1.1


def test_faults_of_the_config_are_told_once_and_those_of_each_start_by_name():
    found = both(flat, 5 + NOISE(9, "posterior")(200, 2), Langevin(40, 0.02))
    lines = warnings_of_starts(found)
    assert sum("leave 0.99 of the start" in line for line in lines) == 1
    assert any(line.startswith("from posterior samples: mean |z| is") for line in lines)
    assert any(line.startswith("from both: R-hat") for line in lines)


@pytest.mark.parametrize(
    ("gap", "warned"),
    [((0.49, 0.1), False), ((0.5, 0.1), True), ((-0.5, 0.1), True), ((0.6, 0.4), False)],
)
def test_a_gap_counts_from_half_a_nat_and_two_errors(good, gap, warned):
    found = Starts(good, good, Estimate(*gap), 1.0, 1.0)
    assert bool(warnings_of_starts(found)) == warned
