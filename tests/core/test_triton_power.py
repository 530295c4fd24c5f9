"""Power iterations in Triton against those in torch: on a GPU, or on a CPU by triton's interpreter.

TRITON_INTERPRET=1 python -m pytest tests/core/test_triton_power.py
"""

import importlib.util
import os

import pytest
import torch
from torch.nn import functional as F

from jebm.core.energy import SpectralLinear
from jebm.native import triton_power

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or (DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="needs triton, and a GPU or TRITON_INTERPRET=1",
)


@pytest.fixture
def layer_of(monkeypatch):
    """A layer's construction does a hundred iterations: minutes in the interpreter."""

    def build(columns, rows):
        with monkeypatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            return SpectralLinear(columns, rows).to(DEVICE)

    return build


def in_torch(weight, u, times):
    for _ in range(times):
        v = F.normalize(weight.mT @ u, dim=0)
        u = F.normalize(weight @ v, dim=0)
    return u, v


@needs_triton
@pytest.mark.parametrize(
    ("rows", "columns"), [(100, 14), (100, 100), (1, 100), (50, 16), (7, 3), (200, 513), (512, 512)]
)
def test_equals_torch(layer_of, rows, columns):
    torch.manual_seed(rows)
    layer = layer_of(columns, rows)
    torch.nn.init.normal_(layer.weight)
    assert triton_power.usable(layer.weight)
    u, v = in_torch(layer.weight.detach(), layer.u.clone(), 5)
    layer.iterate(5)
    torch.testing.assert_close(layer.u, u, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.v, v, rtol=1e-5, atol=1e-6)


@needs_triton
def test_it_ends_at_the_largest_singular_value(layer_of):
    layer = layer_of(30, 20)
    layer.iterate(300)
    largest = torch.linalg.svdvals(layer.weight.detach())[0]
    torch.testing.assert_close(torch.dot(layer.u, layer.weight.detach() @ layer.v), largest)


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of NaN in the interpreter
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_weight_of_zeros_or_nan_gives_what_torch_gives(layer_of, value):
    layer = layer_of(5, 4)
    torch.nn.init.constant_(layer.weight, value)
    u, v = in_torch(layer.weight.detach(), layer.u.clone(), 2)
    layer.iterate(2)
    torch.testing.assert_close((layer.u, layer.v), (u, v), equal_nan=True)


def test_without_a_gpu_in_double_precision_or_too_wide_it_is_not_used(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not triton_power.usable(torch.zeros(2, 3))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not triton_power.usable(torch.zeros(2, 3, dtype=torch.double))
    assert not triton_power.usable(torch.zeros(3, 2).mT)
    assert not triton_power.usable(torch.zeros(2, 1025))
