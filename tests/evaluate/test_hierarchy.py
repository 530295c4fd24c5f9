"""Layers drawn anew against Gaussian conditionals and quadrature; planted classes; known Sobol indices."""

import math

import pytest
import torch
from linear_toy import QuadraticEnergy, joint_model, transparent_model

from jebm.config import Energy, Langevin
from jebm.core.energy import EnergyNet
from jebm.core.prior import sample_prior
from jebm.evaluate.chains import Tilt
from jebm.evaluate.estimates import Means
from jebm.evaluate.hierarchy import (
    changed_classes,
    correct_by_layer,
    hierarchical_samples,
    interpolate,
    layer_columns,
    pictured,
    resample,
    resample_layer,
    tilt_of,
    train_latent_classifiers,
    traverse,
    traverse_plane,
)
from jebm.evaluate.layer_effects import EnergyDraws, energy_draws, layer_effects
from jebm.rng import gaussian_noise

NOISE = gaussian_noise(seed=0, rank=0)
COUPLING = torch.tensor([[0.5, 0.2, -0.6], [0.2, 0.3, 0.5], [-0.6, 0.5, 0.8]])


def coupled_model(latent_dims=(2, 1), matrix=COUPLING):
    """Prior N(0, (I + M)^-1); the generator writes z_i into pixel i."""
    model = transparent_model(latent_dims)
    model.energy = QuadraticEnergy(matrix)
    return model


def test_columns_of_layers():
    assert layer_columns([2, 1, 3], [0, 2]) == [0, 1, 3, 4, 5]
    assert layer_columns([2, 1, 3], [1]) == [2]
    assert layer_columns([2, 1, 3], []) == []


# ------------------------------------------------------------------------------------- a layer drawn anew


@pytest.mark.parametrize("upper", [-1.5, 2.0])
def test_a_clamped_chain_has_the_mean_and_covariance_of_the_gaussian_conditional(upper):
    """p(z_F|z_U) = N(-P_FF^-1 P_FU z_U, P_FF^-1), P = I + M; for s the covariance is wider."""
    count, config = 20_000, Langevin(60, 0.4)
    z = torch.tensor([[7.0, -7.0, upper]]).repeat(count, 1)
    new = resample(QuadraticEnergy(COUPLING), z, [0, 1], NOISE(0, "chain"), config)
    precision = torch.eye(3) + COUPLING
    inner = precision[:2, :2]
    expected = -torch.linalg.solve(inner, precision[:2, 2] * upper)
    covariance = torch.linalg.inv(inner @ (torch.eye(2) - config.step_size**2 / 4 * inner))
    error = covariance.diagonal().sqrt() / math.sqrt(count)
    assert ((new[:, :2].mean(0) - expected).abs() < 5 * error).all()
    torch.testing.assert_close(torch.cov(new[:, :2].T), covariance, rtol=0, atol=0.04)
    assert torch.equal(new[:, 2], z[:, 2])
    assert torch.equal(z[:, :2], torch.tensor([[7.0, -7.0]]).expand(count, 2))  # the input stays as it was


@pytest.mark.parametrize(("column", "clamped"), [(0, 1.2), (1, -0.8)])
def test_a_clamped_chain_on_an_energy_net_matches_quadrature(column, clamped):
    torch.manual_seed(8)
    energy = EnergyNet(2, Energy(width=32, depth=2, output_scale=12.0))
    tilt = Tilt(energy, lambda e: e)
    z = torch.full((4000, 2), clamped)
    new = resample(tilt, z, [column], NOISE(0, "chain"), Langevin(250, 0.2))[:, column]
    axis = torch.linspace(-8, 8, 1601)
    points = torch.full((1601, 2), clamped)
    points[:, column] = axis
    mass = torch.softmax(tilt(points) - 0.5 * axis.square(), 0).detach()
    mean = float(mass @ axis)
    spread = math.sqrt(float(mass @ (axis - mean).square()))
    assert abs(mean) > 0.3  # N(0, 1) would not do
    assert new.mean().item() == pytest.approx(mean, abs=5 * spread / math.sqrt(4000))
    assert new.std().item() == pytest.approx(spread, rel=0.06)


def test_without_an_energy_a_layer_is_drawn_from_the_normal_itself():
    z = torch.ones(5, 3)
    new = resample(None, z, [1, 2], NOISE(0, "chain"), Langevin())
    assert torch.equal(new, torch.cat([z[:, :1], NOISE(0, "chain")(5, 2)], 1))
    assert tilt_of(joint_model((2, 1))) is None


def coupled_samples(c, normal, count):
    """Exact samples of N(0, P^-1), P = [[1, c], [c, 1]]."""
    covariance = torch.tensor([[1.0, -c], [-c, 1.0]]) / (1 - c**2)
    return normal(count, 2) @ torch.linalg.cholesky(covariance).T


@pytest.mark.parametrize(("source", "expected"), [("conditional", 1.0), ("marginal", 0.0)])
def test_the_conditional_draw_keeps_the_layers_coupled_and_the_marginal_one_does_not(source, expected):
    """P = [[1, c], [c, 1]]: E[z_0 z_1] = -c / (1 - c^2) for a layer drawn given the other, 0 for a swap."""
    c, count = 0.6, 20_000
    model = coupled_model((1, 1), torch.tensor([[0.0, c], [c, 0.0]]))
    config = Langevin(60, 0.4)
    z = coupled_samples(c, NOISE(0, "prior"), count)
    new = resample_layer(model, z, 0, config, NOISE(0, "layer"), source=source)
    variance = 1 / (1 - c**2)
    product = (new[:, 0] * new[:, 1]).mean().item()
    assert product == pytest.approx(expected * -c * variance, abs=0.05)
    assert new[:, 0].var().item() == pytest.approx(variance, rel=0.08)
    assert torch.equal(new[:, 1], z[:, 1])


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("source", ["conditional", "marginal"])
@pytest.mark.parametrize("layer", [0, 1])
def test_one_layer_varies_along_a_row_and_the_others_stay(source, layer):
    model, config = coupled_model(), Langevin(5, 0.4)
    images = hierarchical_samples(
        model, config, layer, NOISE(0, "pictures"), rows=3, columns=4, source=source
    )
    assert images.shape == (3, 4, 1, 4, 4)
    z = images.flatten(2)[..., :3]  # this generator writes z into its first pixels
    anchors, _ = sample_prior(model, config, 3, NOISE(0, "pictures"))
    varied = layer_columns([2, 1], [layer])
    kept = layer_columns([2, 1], [1 - layer])
    assert torch.equal(z[..., kept], anchors[:, None, kept].expand(3, 4, -1))
    assert (z[..., varied].flatten(0, 1).unique(dim=0)).shape[0] == 12


def test_pictures_are_the_decoders_means():
    model = joint_model((2, 1), width=4)
    z = NOISE(0, "codes")(2, 3, 3)
    images = pictured(model, z)
    with torch.no_grad():
        torch.testing.assert_close(images[1, 2], model.decode(z[1, 2:])[0])


def test_traversals_vary_the_named_columns_alone():
    z, values = torch.arange(6.0).view(2, 3), torch.tensor([-1.0, 0.0, 1.0, 2.0])
    line = traverse(z, 1, values)
    assert line[1].tolist() == [[3, -1, 5], [3, 0, 5], [3, 1, 5], [3, 2, 5]]
    plane = traverse_plane(z[0], (2, 0), values)
    assert plane.shape == (4, 4, 3)
    assert plane[1, 3].tolist() == [2, 1, 0]  # first column of the pair downwards, second to the right
    assert z.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_codes_are_interpolated_in_equal_steps(factor):
    start = NOISE(0, "codes")(4, 5)
    path = interpolate(start, factor * start, 5)
    torch.testing.assert_close(path[:, 0], start)
    torch.testing.assert_close(path[:, 1], start * (0.75 + 0.25 * factor))
    torch.testing.assert_close(path[:, -1], factor * start)


# ---------------------------------------------------------------------------------- the class in each layer


def labelled_images(normal, count, shifts=(0.0, 1.0, 3.0)):
    """Two classes, shifted apart by +-shift in the first pixel of each layer's two; noise N(0, 1)."""
    x = normal(count, 1, 4, 4)
    labels = (normal(count) > 0).long()
    for layer, shift in enumerate(shifts):
        x.view(count, 16)[:, 2 * layer] += shift * (2 * labels - 1)
    return x, labels


def test_accuracies_reach_the_best_possible_in_each_layer():
    """With classes at +-shift the best accuracy is Phi(shift): 1/2, 0.841, 0.9987."""
    model = transparent_model((2, 2, 2))

    def batch(step):
        x, labels = labelled_images(NOISE(step, "train"), 128)
        labels[::9] = -1  # images without a label; their pixels would mislead
        x[::9] *= -1
        return x, labels

    classifiers = train_latent_classifiers(model, batch, classes=2, updates=400)
    means = Means(3)
    for step in range(4):
        x, labels = labelled_images(NOISE(step, "test"), 5000)
        labels[0] = -1
        correct = correct_by_layer(model, classifiers, x, labels)
        assert correct.shape == (4999, 3)
        means.add(correct)
    best = [0.5 * (1 + math.erf(shift / math.sqrt(2))) for shift in (0, 1, 3)]
    for accuracy, most in zip(means.result(), best, strict=True):
        error = math.sqrt(most * (1 - most) / 19_996)
        assert accuracy.standard_error == pytest.approx(error, rel=0.1)
        assert most - 0.006 - 4 * error < accuracy.value < most + 4 * error


def test_classifiers_depend_on_their_seed_alone():
    model = transparent_model((1, 1))

    def trained(seed):
        torch.randn(3)  # the global generator moves on and must not matter
        state = torch.random.get_rng_state()
        net = train_latent_classifiers(
            model,
            lambda step: labelled_images(NOISE(step, "x"), 16, (0, 0)),
            classes=2,
            updates=3,
            seed=seed,
        )
        assert torch.equal(torch.random.get_rng_state(), state)
        return torch.cat([parameter.flatten() for parameter in net.parameters()])

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


@pytest.mark.parametrize("source", ["conditional", "marginal"])
def test_the_class_changes_with_the_layer_that_carries_it_and_no_other(source):
    model = transparent_model((2, 2, 2))
    x = NOISE(0, "x")(4000, 1, 4, 4)
    changed = changed_classes(
        model, x, lambda x: x.flatten(1)[:, 2] > 0, Langevin(), NOISE(0, "layers"), source=source
    )
    assert changed.shape == (4000, 3)
    shares = changed.double().mean(0)
    assert shares[0] == shares[2] == 0
    assert shares[1] == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(4000))
    x.view(4000, 16)[:, 4] = 100  # a code that the prior never has: every draw leaves its class
    changed = changed_classes(
        model, x, lambda x: x.flatten(1)[:, 4] > 50, Langevin(), NOISE(0, "layers"), source=source
    )
    assert changed.double().mean(0).tolist() == [0, 0, 1]


# ------------------------------------------------------------------------------------- the layers' part in f


def independent_draws(f, latent_dims, count=20_000):
    z = NOISE(0, "p0")(count, sum(latent_dims))
    return energy_draws(f, latent_dims, z, NOISE(0, "twins"), None)


def test_an_additive_f_divides_its_variance_among_the_layers():
    """f = a.z on N(0, I): both indices of a layer are |a_l|^2 / |a|^2, mean |change| 2 |a_l| / sqrt(pi)."""
    a = torch.tensor([1.0, -1.0, 2.0, 0.0])
    effects = layer_effects(independent_draws(lambda z: z @ a + 5, [2, 1, 1]))
    for effect, square in zip(effects, (2, 4, 0), strict=True):
        for index in (effect.first_order, effect.total):
            assert index.value == pytest.approx(square / 6, abs=5 * index.standard_error + 1e-9)
            assert index.standard_error < 0.01
        change = effect.change
        exact = 2 * math.sqrt(square / math.pi)
        assert change.value == pytest.approx(exact, abs=5 * change.standard_error + 1e-9)


def test_a_pure_interaction_has_no_first_order_effect_and_a_whole_total_one():
    for effect in layer_effects(independent_draws(lambda z: z[:, 0] * z[:, 1], [1, 1])):
        assert effect.first_order.value == pytest.approx(0, abs=5 * effect.first_order.standard_error)
        assert effect.total.value == pytest.approx(1, abs=5 * effect.total.standard_error)
        assert effect.total.standard_error < 0.02


def test_effects_under_a_coupled_prior_match_the_gaussian_moments():
    """f = -c z_0 z_1, P = [[1, c], [c, 1]]: Var E[f|z_0] / Var f = 2 c^2 / (1 + c^2); total: 1 less that."""
    c, config = 0.5, Langevin(100, 0.3)
    f = QuadraticEnergy(torch.tensor([[0.0, c], [c, 0.0]]))
    batches = []
    for position in range(3):
        normal = NOISE(position, "effects")
        batches.append(energy_draws(f, [1, 1], coupled_samples(c, normal, 10_000), normal, config))
    draws = EnergyDraws(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    exact = 2 * c**2 / (1 + c**2)
    for effect in layer_effects(draws):
        assert effect.first_order.standard_error < 0.02
        # Beside the error, 0.01 for s^2/4 = 2 % of variance that the chain adds.
        for index, value in ((effect.first_order, exact), (effect.total, 1 - exact)):
            assert index.value == pytest.approx(value, abs=4 * index.standard_error + 0.01)


def test_standard_errors_are_the_spread_of_repeated_estimates():
    draws = independent_draws(lambda z: z[:, 0] + 0.5 * z[:, 1] + z[:, 0] * z[:, 1], [1, 1], 200 * 400)
    parts = zip(*(part.split(400) for part in draws), strict=True)
    effects = [layer_effects(EnergyDraws(*part))[0] for part in parts]
    for estimates in zip(*effects, strict=True):
        values = torch.tensor([estimate.value for estimate in estimates])
        errors = torch.tensor([estimate.standard_error for estimate in estimates])
        assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.2)  # 1 / sqrt(400) = 0.05


def test_a_constant_f_has_no_shares():
    (effect,) = layer_effects(independent_draws(lambda z: z.new_ones(len(z)), [2], 50))
    assert math.isnan(effect.first_order.value)
    assert effect.change == (0, 0)


def test_every_measure_works_on_a_model_as_it_is_built():
    model, config, normal = joint_model((2, 1, 3), width=8), Langevin(3, 0.4), NOISE(0, "smoke")
    images = hierarchical_samples(model, config, 1, normal, rows=2, columns=2, source="conditional")
    assert images.shape == (2, 2, 1, 4, 4)
    assert torch.isfinite(images).all()
    changed = changed_classes(
        model, images.flatten(0, 1), lambda x: x.flatten(1).argmax(1), config, normal, source="conditional"
    )
    assert changed.shape == (4, 3)
    z, _ = sample_prior(model, config, 50, normal)
    effects = layer_effects(energy_draws(tilt_of(model), model.latent_dims, z, normal, config))
    assert all(0 < effect.change.value < 10 for effect in effects)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_generator_map_is_the_identity_that_the_measures_take_it_to_be():
    """Layers are clamped and classified in z; a generator with another T needs them in noise space."""
    z = NOISE(0, "noise")(4, 3)
    assert torch.equal(joint_model((2, 1)).generator.latents(z), z)
