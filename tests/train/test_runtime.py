"""Signals to a training process, and what it sets for all of its torch."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from helpers import tiny_config

from jebm.core.precision import set_tf32, tf32
from jebm.train.runtime import first_signal, prepare_process


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """What a shell starts in the background ignores SIGINT, and Python leaves it at that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_the_first_signal_asks_and_the_second_one_does_what_it_always_did() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    received: list[signal.Signals] = []
    with first_signal(received.append):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with first_signal(received.append):  # nobody asks
        pass
    assert received == [signal.SIGTERM]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(("precision", "rounded"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_both_kinds_of_products_are_as_the_config_says(precision: str, rounded: bool) -> None:
    """Torch's own defaults are TF32 for convolutions and float32 for linear layers."""
    set_tf32(convolutions=not rounded, linear=rounded)
    try:
        prepare_process(tiny_config("unused", train__precision=precision), torch.device("cpu"))
        assert tf32() == {"convolutions": rounded, "linear": rounded}
        assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is rounded
    finally:
        set_tf32(convolutions=False, linear=False)
