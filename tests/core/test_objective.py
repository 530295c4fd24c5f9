"""The learning gradients against finite differences, quadrature, and the paper's two losses.

The reference losses below are written anew in double precision and share with the code only the forward
passes of the nets (which test_nets and test_energy check).
"""

import copy
import math

import pytest
import torch
from torch import Tensor

from jebm.config import Langevin
from jebm.core.model import JointModel
from jebm.core.objective import Objective, reconstruct
from jebm.core.prior import sample_prior
from jebm.rng import gaussian_noise

NOISE = gaussian_noise(seed=0, rank=0)
STD = 0.8  # of the tiny model's likelihood
PLAYERS = ["generator", "inference", "energy"]


def images(count: int) -> Tensor:
    return torch.tanh(NOISE(0, "images")(count, 1, 4, 4))


def enlarge(model: JointModel, factor: float = 1.5) -> JointModel:
    """Scale the weights up, so that posterior and image depend on their inputs to a visible degree."""
    with torch.no_grad():
        for net in (model.generator, model.inference):
            for parameter in net.parameters():
                parameter.mul_(factor)
    return model


def gradients(loss: Tensor, model: JointModel, player: str) -> Tensor:
    """Return one flat vector of a player's gradient, zeros where a parameter has none."""
    parameters = list(getattr(model, player).parameters())
    parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(parameters, parts, strict=True)
        ]
    )


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


def double(model: JointModel) -> JointModel:
    return copy.deepcopy(model).double()


# ---- (i) the loss as written, at fixed noise and fixed samples of the prior ----


def reference_loss(model: JointModel, x: Tensor, noise: Tensor, prior_z: Tensor) -> Tensor:
    mean, log_variance = model.inference(x)
    z = mean + (log_variance / 2).exp() * noise
    error = ((x - model.decode(z)) ** 2).flatten(1).sum(1).mean() / (2 * STD**2)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    return error + kl - model.energy(z).mean() + model.energy(prior_z).mean()


@torch.no_grad()
def finite_differences(loss, model: JointModel, player: str, step: float = 1e-5) -> Tensor:
    """Return central differences of loss() in every parameter of a double-precision player."""
    slopes = []
    for parameter in getattr(model, player).parameters():
        flat = parameter.view(-1)
        for i in range(len(flat)):
            kept = flat[i].item()
            flat[i] = kept + step
            above = loss()
            flat[i] = kept - step
            slopes.append((above - loss()) / (2 * step))
            flat[i] = kept
    return torch.stack(slopes)


@pytest.mark.parametrize("player", PLAYERS)
@pytest.mark.parametrize(("latent_dims", "spectral_norm"), [((1, 1), False), ((1, 1), True), ((2,), True)])
def test_gradients_are_the_finite_differences_of_the_loss(tiny_model, player, latent_dims, spectral_norm):
    model = enlarge(tiny_model(latent_dims, spectral_norm=spectral_norm, output_scale=3.0))
    x, noise, prior_z = images(3), NOISE(0, "posterior")(3, 2), NOISE(0, "prior")(5, 2)
    exact = double(model)
    inputs = (x.double(), noise.double(), prior_z.double())
    terms = Objective(exact)(*inputs)
    assert terms.loss.item() == pytest.approx(reference_loss(exact, *inputs).item(), rel=1e-12)
    ours = gradients(terms.loss, exact, player)
    reference = finite_differences(lambda: reference_loss(exact, *inputs), exact, player)
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-8 * reference.abs().max().item())
    single = gradients(Objective(model)(x, noise, prior_z).loss, model, player)
    assert relative_error(single, ours) < 1e-5


# ---- (ii) what the loss is for: the ELBO, with log Z, by quadrature on the plane ----


def grid(half_width: float, points: int) -> Tensor:
    axis = torch.linspace(-half_width, half_width, points, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


def log_normal(z: Tensor) -> Tensor:
    return -0.5 * (z**2).sum(-1) - math.log(2 * math.pi)


def negative_elbo(model: JointModel, x: Tensor) -> Tensor:
    """-ELBO, mean over the images: every expectation under q and log Z a sum over a fine grid."""
    noise = grid(6, 81)
    weight = torch.softmax(log_normal(noise), 0)
    prior_points = grid(8, 161)
    log_cell = 2 * math.log(16 / 160)
    log_z = (model.energy(prior_points) + log_normal(prior_points) + log_cell).logsumexp(0)
    mean, log_variance = model.inference(x)
    bound = x.new_zeros(())
    for image, mu, half in zip(x, mean, log_variance / 2, strict=True):
        z = mu + half.exp() * noise
        log_q = log_normal(noise) - half.sum()
        error = ((image - model.decode(z)) ** 2).flatten(1).sum(1)
        log_likelihood = -error / (2 * STD**2) - 8 * math.log(2 * math.pi * STD**2)
        log_prior = model.energy(z) + log_normal(z) - log_z
        bound = bound + (weight * (log_likelihood + log_prior - log_q)).sum()
    return -bound / len(x)


def exact_prior_samples(model: JointModel, count: int) -> Tensor:
    """Draw from p(z) on a grid of cells, systematically: no Markov chain, next to no noise."""
    points = grid(8, 321)
    with torch.no_grad():
        mass = torch.softmax(double(model).energy(points) + log_normal(points), 0)
    positions = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return points[torch.searchsorted(mass.cumsum(0), positions).clamp_max(len(points) - 1)].float()


def spread_noise(side: int) -> Tensor:
    """Return side^2 points of equal weight that stand for N(0, I): quantiles, scaled to variance one."""
    levels = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    axis = torch.special.ndtri(levels)
    axis = axis / axis.square().mean().sqrt()
    return torch.cartesian_prod(axis, axis).float()


@pytest.mark.parametrize("latent_dims", [(1, 1), (2,)])
def test_gradients_are_those_of_the_negative_elbo_with_log_z(tiny_model, latent_dims):
    """The contrastive gradient of the energy net contains grad log Z, though the loss does not."""
    model = enlarge(tiny_model(latent_dims, output_scale=4.0, seed=1))
    x, noise = images(2), spread_noise(80)
    prior_z = exact_prior_samples(model, 20_000)
    loss = Objective(model)(x.repeat_interleave(len(noise), 0), noise.repeat(len(x), 1), prior_z).loss
    exact = double(model)
    for player in PLAYERS:
        ours = gradients(loss, model, player).double()
        parameters = list(getattr(exact, player).parameters())
        reference = torch.cat(
            [g.flatten() for g in torch.autograd.grad(negative_elbo(exact, x.double()), parameters)]
        )
        assert relative_error(ours, reference) < 0.02, player
        # autograd of the quadrature itself against its finite difference, along the gradient
        direction = reference / reference.norm()
        pieces = torch.split(direction, [p.numel() for p in parameters])
        values = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                for parameter, piece in zip(parameters, pieces, strict=True):
                    parameter.add_(step * piece.view_as(parameter))
                values.append(negative_elbo(exact, x.double()))
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.add_(1e-5 * piece.view_as(parameter))
        slope = (values[0] - values[1]) / 2e-5
        assert (ours @ direction).item() == pytest.approx(slope.item(), rel=0.02), player


def test_the_negative_phase_is_needed(tiny_model):
    """The check above is sharp: samples of N(0, I) in place of p give another gradient of f."""
    model = enlarge(tiny_model((1, 1), output_scale=4.0, seed=1))
    x, noise = images(2), spread_noise(80)
    loss = Objective(model)(x.repeat_interleave(len(noise), 0), noise.repeat(len(x), 1), noise).loss
    exact = double(model)
    parameters = list(exact.energy.parameters())
    reference = torch.cat(
        [g.flatten() for g in torch.autograd.grad(negative_elbo(exact, x.double()), parameters)]
    )
    assert relative_error(gradients(loss, model, "energy"), reference) > 0.1


# ---- (iii) who gets which gradient ----


def test_no_gradient_reaches_the_samples_of_the_prior(tiny_model):
    model = tiny_model((1, 1))
    x, noise = images(3), NOISE(0, "posterior")(3, 2)
    prior_z = NOISE(0, "prior")(3, 2)
    leaf = prior_z.clone().requires_grad_()
    weight = model.energy.linears[0].weight[0, 0]
    attached = leaf * (weight / weight.detach())  # the same numbers, as a function of the energy's weights
    loss = Objective(model)(x, noise, attached).loss
    assert torch.autograd.grad(loss, leaf, allow_unused=True, retain_graph=True) == (None,)
    constant = Objective(model)(x, noise, prior_z).loss
    for player in PLAYERS:
        assert torch.equal(gradients(loss, model, player), gradients(constant, model, player))


@pytest.mark.parametrize("kind", ["joint", "top"])
def test_the_penalty_is_mean_f_squared_and_concerns_only_the_energy(tiny_model, kind):
    model = double(enlarge(tiny_model((1, 1), kind=kind, output_scale=3.0, activation="silu")))
    x, noise, prior_z = (t.double() for t in (images(3), NOISE(0, "q")(3, 2), NOISE(0, "prior")(5, 2)))
    with torch.no_grad():
        z = model.posterior(x, noise).code_BD

    def penalty() -> Tensor:
        return model.f(z).square().mean() + model.f(prior_z).square().mean()

    plain, penalised = (Objective(model, penalty=weight)(x, noise, prior_z).loss for weight in (0.0, 0.7))
    assert (penalised - plain).item() == pytest.approx(0.7 * penalty().item(), rel=1e-12)
    for player in ("generator", "inference"):
        assert torch.equal(gradients(penalised, model, player), gradients(plain, model, player))
    excess = gradients(penalised, model, "energy") - gradients(plain, model, "energy")
    expected = 0.7 * finite_differences(penalty, model, "energy")
    torch.testing.assert_close(excess, expected, rtol=1e-6, atol=1e-7)


def test_f_pulls_the_posterior_and_leaves_the_generator(tiny_model):
    """Inference net: grad(distortion + rates) - grad E_q[f]. Generator: its gradient does not see f."""
    model = enlarge(tiny_model((1, 1), output_scale=4.0))
    x, noise, prior_z = images(4), NOISE(0, "posterior")(4, 2), NOISE(0, "prior")(4, 2)
    with_f = Objective(model)(x, noise, prior_z).loss
    z = model.inference(x).rsample(noise)
    pull = gradients(model.energy(z).mean(), model, "inference")
    bare = copy.copy(model)
    bare.energy = None
    without_f = Objective(bare)(x, noise, prior_z).loss
    expected = gradients(without_f, model, "inference") - pull
    torch.testing.assert_close(gradients(with_f, model, "inference"), expected, rtol=1e-4, atol=1e-6)
    assert relative_error(gradients(without_f, model, "inference"), expected) > 0.05
    assert torch.equal(gradients(with_f, model, "generator"), gradients(without_f, model, "generator"))


@pytest.mark.parametrize("spectral_norm", [True, False])
def test_one_backward_gives_the_gradients_of_the_papers_two_losses(tiny_model, spectral_norm):
    """Paper eq. 10-12: generator and inference net with f frozen, then f with z_q and z_p detached."""
    model = enlarge(tiny_model((2, 1), output_scale=4.0, spectral_norm=spectral_norm))
    x, noise, prior_z = images(6), NOISE(0, "posterior")(6, 3), NOISE(0, "prior")(6, 3)
    joint = Objective(model)(x, noise, prior_z).loss

    frozen = copy.deepcopy(model.energy).requires_grad_(False)
    posterior = model.inference(x)
    z_q = posterior.rsample(noise)
    first = model.distortion(x, z_q).mean() + posterior.rate().sum(1).mean() - frozen(z_q).mean()
    second = model.energy(prior_z).mean() - model.energy(z_q.detach()).mean()
    for player, loss in [("generator", first), ("inference", first), ("energy", second)]:
        ours = gradients(joint, model, player)
        assert ours.norm() > 0.01
        torch.testing.assert_close(ours, gradients(loss, model, player), rtol=1e-5, atol=1e-6)


# ---- the terms ----


def test_distortion_is_the_negative_log_likelihood_without_its_constant(tiny_model):
    model = tiny_model((1, 1))
    x, z = images(3), NOISE(0, "z")(3, 2)
    constant = 16 / 2 * math.log(2 * math.pi * STD**2)
    log_likelihood = torch.distributions.Normal(model.decode(z), STD).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(model.distortion(x, z) + constant, -log_likelihood)
    assert model.likelihood.constant(16) == pytest.approx(constant)


def test_terms_add_up_and_only_the_loss_carries_the_gradient(tiny_model):
    model = tiny_model((2, 1), output_scale=4.0)
    x, noise, prior_z = images(5), NOISE(0, "posterior")(5, 3), NOISE(0, "prior")(7, 3)
    terms = Objective(model)(x, noise, prior_z)
    total = terms.distortion + terms.rate_L.sum() - terms.f_posterior + terms.f_prior
    torch.testing.assert_close(terms.loss.detach(), total)
    *values, q = terms
    assert [value.requires_grad for value in values] == [True, False, False, False, False]
    assert not any(moment.requires_grad for moment in q)
    with torch.no_grad():
        posterior = model.inference(x)
        assert all(torch.equal(mine, other) for mine, other in zip(q, posterior, strict=True))
        rates = posterior.rate().mean(0)
        z = posterior.rsample(noise)
        torch.testing.assert_close(terms.rate_L, torch.stack([rates[:2].sum(), rates[2]]))
        torch.testing.assert_close(terms.f_posterior, model.energy(z).mean())
        torch.testing.assert_close(terms.f_prior, model.energy(prior_z).mean())
        torch.testing.assert_close(terms.distortion, model.distortion(x, z).mean())


def test_reconstruct_decodes_the_mean(tiny_model):
    model, x = tiny_model((1, 1)), images(2)
    again = reconstruct(model, x)
    assert torch.equal(again, model.decode(model.inference(x)[0]))
    assert not again.requires_grad


def test_the_gaussian_prior_is_the_model_with_f_zero(tiny_model):
    x, noise = images(4), NOISE(0, "posterior")(4, 3)
    gaussian, zero = tiny_model((2, 1), width=0), tiny_model((2, 1), spectral_norm=False)
    with torch.no_grad():
        for parameter in zero.energy.parameters():
            parameter.zero_()
    prior_z, _ = sample_prior(gaussian, Langevin(3, 0.4), 4, NOISE(0, "chain"))
    ours, reference = (Objective(model)(x, noise, prior_z) for model in (gaussian, zero))
    # And that of any energy net without samples of its prior: it has not joined yet.
    waiting = tiny_model((2, 1))
    without = Objective(waiting)(x, noise, None)
    for terms, model in ((reference, zero), (without, waiting)):
        for mine, other in zip(ours[:-1], terms[:-1], strict=True):
            assert torch.equal(mine, other)
        for player in ("generator", "inference"):
            mine = gradients(ours.loss, gaussian, player)
            assert torch.equal(mine, gradients(terms.loss, model, player))
    assert gradients(without.loss, waiting, "energy").abs().max() == 0


def test_bfloat16_autocast_stays_near_float32_and_keeps_f_and_rates_exact(tiny_model):
    """bf16 has 8 bits: the loss within 2 %, gradients within 10 %; f and rates in float32."""
    model = enlarge(tiny_model((2, 1), output_scale=4.0), 1.2)
    x, noise, prior_z = images(64), NOISE(0, "posterior")(64, 3), NOISE(0, "prior")(64, 3)
    full, half = (
        Objective(model)(x, noise, prior_z),
        Objective(model, autocast=torch.bfloat16)(x, noise, prior_z),
    )
    assert all(term.dtype == torch.float32 for term in (*half[:-1], *half.features))
    assert half.loss.item() == pytest.approx(full.loss.item(), rel=0.02)
    assert half.loss.item() != full.loss.item()  # something was cast
    assert half.f_prior.item() == full.f_prior.item()  # f never is
    for player in PLAYERS:
        error = relative_error(gradients(half.loss, model, player), gradients(full.loss, model, player))
        assert error < 0.1, player
