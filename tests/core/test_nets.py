"""Generator and inference net: sizes to the unit, shapes, and a second statement of the forward passes."""

import pytest
import torch
from torch.nn import functional as F

from jebm.config import Config, Energy, Generator, Inference, Langevin, Model, Run
from jebm.core.generator import GeneratorNet
from jebm.core.inference import InferenceNet
from jebm.core.layers import Convolution, TransposedConvolution, channels_last
from jebm.core.model import JointModel, build_model
from jebm.core.objective import Objective
from jebm.core.parts import Shapes
from jebm.core.prior import sample_prior
from jebm.rng import gaussian_noise

NOISE = gaussian_noise(seed=0, rank=0)

SVHN_HIERARCHICAL = Config(
    model=Model(32, 3, (2, 2, 2, 10)),
    inference=Inference((32, 64, 64), 256),
    generator=Generator((32, 64, 64), 256, "add"),
    energy=Energy(50, 4),
)
SVHN_FID = Config(
    model=Model(32, 3, (10,) * 5),
    inference=Inference((128, 256, 256, 512), 1024),
    generator=Generator((128, 256, 256, 512, 1024), 2048, "concat"),
    energy=Energy(100, 2),
)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("config", "generator", "inference", "energy"),
    [(SVHN_HIERARCHICAL, 392_288, 752_160, 8_551), (SVHN_FID, 55_348_608, 18_999_396, 15_301)],
    ids=["svhn_hierarchical", "svhn_fid"],
)
def test_the_papers_two_models_have_the_papers_parameters(config, generator, inference, energy):
    with torch.device("meta"):  # no memory, no drawing
        model = JointModel(config)
    assert (count(model.generator), count(model.inference), count(model.energy)) == (
        generator,
        inference,
        energy,
    )


def config_of(layers: int, size: int, channels: int, join: str, **sections) -> Config:
    trunk = tuple(range(3, 3 + layers - 1))
    return Config(
        model=Model(size, channels, tuple(range(1, layers + 1))),
        inference=Inference(trunk, 6),
        generator=Generator((2, *trunk) if join == "concat" and layers > 1 else trunk, 7, join),
        **{"energy": Energy(8, 1), **sections},
    )


@pytest.mark.parametrize("join", ["add", "concat"])
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (64, 3)])
def test_shapes_and_ranges(join, layers, size, channels):
    config = config_of(layers, size, channels, join)
    model = build_model(config)
    width = layers * (layers + 1) // 2
    for batch in (1, 3):
        x = torch.tanh(NOISE(0, "images")(batch, channels, size, size))
        posterior = model.inference(x)
        assert posterior.mean_BD.shape == posterior.log_variance_BD.shape == (batch, width)
        z, _ = sample_prior(model, Langevin(2, 0.4), batch, NOISE(0, "chain"))
        assert z.shape == (batch, width)
        x_hat = model.decode(0.5 * z)  # tanh of more than 9 is 1 in float32
        assert x_hat.shape == x.shape
        assert x_hat.abs().max() < 1
        assert model.energy(z).shape == (batch,)
        terms = Objective(model)(x, NOISE(0, "posterior")(batch, width), z)
        assert terms.rate_L.shape == (layers,)
        assert all(term.shape == () for term in (terms.loss, terms.distortion, terms.f_prior))


@pytest.mark.parametrize("size", [2, 3, 5, 29, 30, 31])
def test_any_image_size_comes_back(size):
    for join in ("add", "concat"):
        model = build_model(config_of(2, size, 1, join))
        x = torch.zeros(2, 1, size, size)
        assert model.decode(model.inference(x).mean_BD).shape == x.shape


@pytest.mark.parametrize("join", ["add", "concat"])
def test_every_parameter_gets_a_gradient(join):
    model = build_model(config_of(4, 32, 3, join))
    x = torch.tanh(NOISE(0, "images")(8, 3, 32, 32))
    z, _ = sample_prior(model, Langevin(2, 0.4), 8, NOISE(0, "chain"))
    Objective(model)(x, NOISE(0, "posterior")(8, 10), z).loss.backward()
    for name, parameter in model.named_parameters():
        if name == "energy.linears.1.bias":  # a constant added to f changes nothing
            torch.testing.assert_close(parameter.grad, torch.zeros(1), rtol=0, atol=1e-6)
        else:
            assert parameter.grad.norm() > 0, name


def test_every_layer_acts_on_the_image_and_the_posterior_sees_it():
    for join in ("add", "concat"):
        model = build_model(config_of(4, 32, 3, join))
        z = NOISE(0, "z")(1, 10).requires_grad_()
        x = model.decode(z)
        (gradient,) = torch.autograd.grad(x.square().sum(), z)
        assert (gradient != 0).all()
        pixels = torch.zeros(1, 3, 32, 32, requires_grad=True)
        for moment in model.inference(pixels):
            for i in range(10):
                (gradient,) = torch.autograd.grad(moment[0, i], pixels, retain_graph=True)
                assert gradient.abs().sum() > 0


def transposed(h, weight):
    return F.conv_transpose2d(h, weight, stride=2, padding=1)


def leaky(h):
    return F.leaky_relu(h, 0.2)


def test_hierarchical_generator_restated():
    """h1 = g1(g2(g3(top(z4) + A3 z3) + A2 z2) + A1 z1), every operation written out."""
    net = build_model(SVHN_HIERARCHICAL).generator
    p = dict(net.named_parameters())
    z1, z2, z3, z4 = torch.split(NOISE(0, "z")(3, 16), [2, 2, 2, 10], dim=1)

    h = leaky(F.linear(z4, p["top.0.weight"], p["top.0.bias"]))
    h = leaky(F.linear(h, p["top.2.weight"], p["top.2.bias"]))
    h = F.linear(h, p["top.4.weight"], p["top.4.bias"])
    h = h + F.linear(z3, p["levels.0.join.weight"], p["levels.0.join.bias"])
    spread = F.linear(h, p["levels.0.body.0.0.weight"], p["levels.0.body.0.0.bias"])
    h = leaky(spread).reshape(3, 64, 4, 4)
    for level, (z, side) in enumerate([(None, 4), (z2, 8), (z1, 16)]):
        if z is not None:
            joined = F.linear(z, p[f"levels.{level}.join.0.weight"], p[f"levels.{level}.join.0.bias"])
            h = h + joined.reshape(3, -1, side, side)
        h = leaky(transposed(h, p[f"levels.{level}.body.1.weight"]))
        h = F.conv2d(h, p[f"levels.{level}.body.3.weight"], padding=1)
    torch.testing.assert_close(net(torch.cat([z1, z2, z3, z4], 1)), h, rtol=1e-4, atol=1e-6)


def test_concatenating_generator_restated():
    net = build_model(config_of(3, 16, 1, "concat")).generator
    p = dict(net.named_parameters())
    z1, z2, z3 = torch.split(NOISE(0, "z")(3, 6), [1, 2, 3], dim=1)

    h = leaky(F.linear(z3, p["top.0.weight"], p["top.0.bias"]))
    h = leaky(F.linear(h, p["top.2.weight"], p["top.2.bias"]))
    h = leaky(F.linear(h, p["top.4.weight"], p["top.4.bias"])).reshape(3, 4, 4, 4)
    for level, (z, shape) in enumerate([(z2, (4, 4, 4)), (z1, (3, 8, 8))]):
        joined = leaky(F.linear(z, p[f"levels.{level}.join.0.weight"], p[f"levels.{level}.join.0.bias"]))
        h = torch.cat([h, joined.reshape(3, *shape)], 1)
        h = leaky(F.conv2d(h, p[f"levels.{level}.body.0.weight"], padding=1))
        h = leaky(transposed(h, p[f"levels.{level}.body.2.weight"]))
        h = leaky(F.conv2d(h, p[f"levels.{level}.body.4.weight"], padding=1))
    h = F.conv2d(h, p["final.0.weight"], padding=1)
    torch.testing.assert_close(net(torch.cat([z1, z2, z3], 1)), h, rtol=1e-4, atol=1e-6)


def test_inference_net_restated():
    net = build_model(config_of(3, 16, 1, "add")).inference
    p = dict(net.named_parameters())
    x = torch.tanh(NOISE(0, "images")(2, 1, 16, 16))

    def down(r, name):
        r = F.leaky_relu(F.conv2d(r, p[f"{name}.0.weight"], stride=2, padding=1), 0.01)
        return F.leaky_relu(F.conv2d(r, p[f"{name}.2.weight"], padding=1), 0.01)

    def linear(r, name):
        return F.linear(r.flatten(1), p[f"{name}.weight"], p[f"{name}.bias"])

    r1 = down(x, "trunk.0")
    r2 = down(r1, "trunk.1")
    top = F.leaky_relu(linear(r2, "heads.2.1.0"), 0.01)
    top = F.leaky_relu(linear(top, "heads.2.1.2"), 0.01)
    # each layer's linear map holds the means first, then the log-variances
    layers = [linear(down(x, "heads.0.0"), "moments.0"), linear(down(r1, "heads.1.0"), "moments.1")]
    halves = [layer.chunk(2, dim=1) for layer in [*layers, linear(top, "moments.2")]]
    posterior = net(x)
    for ours, half in zip(posterior, zip(*halves, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(half, 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("odd", [None, 0, 1])
def test_convolutions_of_tiny_planes_are_convolutions(size, odd):
    """With so many weights they are products of matrices up to 2 x 2; `odd` is a transposed one's padding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if odd is None:
            layer, plain = Convolution(480, 480).double(), lambda x, w: F.conv2d(x, w, padding=1)
        else:
            layer = TransposedConvolution(380, 350, output_padding=odd).double()

            def plain(x, w):
                return F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=odd)

        x = channels_last(torch.randn(3, layer.in_channels, size, size, dtype=torch.float64))
        found, expected = layer(x.requires_grad_()), plain(x, layer.weight)
        assert found.is_contiguous(memory_format=torch.channels_last)
        gradient = torch.randn_like(expected)
    assert (size > 2) == (type(found.grad_fn).__name__ == "ConvolutionBackward0")
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, [x, layer.weight], gradient),
        torch.autograd.grad(expected, [x, layer.weight], gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_convolutions_start_xavier_normal_and_linear_maps_as_torch_has_them():
    model = build_model(SVHN_HIERARCHICAL)
    for module in [*model.generator.modules(), *model.inference.modules()]:
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            assert module.bias is None
            fans = (module.in_channels + module.out_channels) * module.kernel_size[0] ** 2
            expected = (2 / fans) ** 0.5
            if module.weight.numel() > 5000:
                assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
                assert module.weight.abs().max() > 3 * expected  # normal, not uniform
        elif isinstance(module, torch.nn.Linear):
            assert module.weight.abs().max() <= module.in_features**-0.5


def test_initial_weights_depend_on_the_seed_alone():
    config = config_of(2, 8, 1, "add")
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = build_model(config).state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is not moved
    torch.manual_seed(456)
    again = build_model(config).state_dict()
    other = build_model(config_of(2, 8, 1, "add", run=Run(seed=1))).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["generator.top.0.weight"], other["generator.top.0.weight"])


def test_initial_weights_of_the_backbone_do_not_know_the_energy():
    arms = [
        build_model(config_of(3, 16, 1, "add", energy=Energy(width, depth)))
        for width, depth in [(0, 2), (8, 1), (50, 4)]
    ]
    assert arms[0].energy is None
    for other in arms[1:]:
        for net in ("generator", "inference"):
            mine, theirs = (getattr(model, net).state_dict() for model in (arms[0], other))
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_the_nets_stand_alone():
    """Each is built from its own section, without the others."""
    shapes = Shapes((1, 8, 8), ((1,), (2,)), 5)
    mean, _ = InferenceNet(shapes, Inference((3,), 4))(torch.zeros(1, 1, 8, 8))
    generator = GeneratorNet(shapes, Generator((3,), 4))
    assert generator(generator.latents(mean)).shape == (1, 5, 8, 8)


def test_a_single_layer_has_a_trunk_of_convolutions_as_in_lebm():
    """The generator by hand: two fully connected layers, a plane of 4 x 4, transposed convolutions."""
    config = Config(
        model=Model(32, 3, (9,)), inference=Inference((2, 3), 6), generator=Generator((4, 5, 6), 7)
    )
    model = build_model(config)
    weights = dict(model.generator.named_parameters())
    h = code = NOISE(0, "z")(2, 9)
    for layer in (0, 2):
        h = F.leaky_relu(F.linear(h, weights[f"top.{layer}.weight"], weights[f"top.{layer}.bias"]), 0.2)
    h = F.linear(h, weights["top.4.weight"], weights["top.4.bias"]).view(2, 6, 4, 4)
    for layer in (2, 4, 6):
        h = F.conv_transpose2d(F.leaky_relu(h, 0.2), weights[f"final.{layer}.weight"], stride=2, padding=1)
    torch.testing.assert_close(model.generator(code), h, rtol=1e-5, atol=1e-6)
    # The inference net has a trunk of another length, and every parameter learns.
    x = torch.tanh(NOISE(0, "images")(8, 3, 32, 32))
    z, _ = sample_prior(model, Langevin(2, 0.4), 8, NOISE(0, "chain"))
    Objective(model)(x, NOISE(0, "posterior")(8, 9), z).loss.backward()
    still = {name for name, parameter in model.named_parameters() if parameter.grad.norm() == 0}
    assert still <= {"energy.linears.2.bias"}  # a constant added to f changes nothing
