"""Trainings of 10 updates in gloo processes: `gloo_worker.py FOLDER WORLD_SIZE-NOISE…`, one after the other.

Writes the losses of every step and the last state's tensors to FOLDER/WORLD_SIZE-NOISE (rank 0). In float64:
Adam divides small gradients by their own size, so that in float32 mere rounding moves weights by up to 4e-3
within 20 updates.
"""

import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from helpers import tiny_config

from forked import exit_code
from jebm.data.dataset import load_images
from jebm.data.loader import Loader
from jebm.rng import gaussian_noise
from jebm.store.storage import open_store
from jebm.train.group import process_group
from jebm.train.metrics import Clock, Meter
from jebm.train.runtime import Runtime, member_runtime, prepare_process
from jebm.train.state import Horizon, TrainState
from jebm.train.update import JointUpdate, features_of


def train(runtime: Runtime, *, noisy: str) -> dict[str, object]:
    """Do 10 updates; return the losses, means over ranks, and copies of the state's tensors."""
    config = tiny_config(
        "unused",
        cluster__workers=runtime.world_size,
        train__ema_decay=0.9,
        train__gaussian_share=0.25,  # DDP has parameters then that the loss does not touch
        train__energy_updates=2,
        train__accumulate=2 if runtime.world_size == 5 else 1,  # 12 or 13 images of each, in two pieces
    )
    prepare_process(config, runtime.device)
    images = load_images(open_store(config.data.train))
    loader = Loader(
        images,
        batch_size=config.train.batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=0,
        device=runtime.device,
    )
    state = TrainState.build(config, runtime)
    noise = gaussian_noise(0, 0 if noisy == "same" else runtime.rank)
    silence = lambda _position, _purpose: lambda *shape: torch.zeros(shape)  # noqa: E731
    update = JointUpdate(
        state,
        config,
        runtime,
        silence if noisy == "silence" else noise,
        Horizon(loader.steps_per_epoch, 10),
        Clock(runtime.device),
    )
    losses = []
    for step in range(10):
        meter = Meter()
        meter.add(update(loader.batch(step).double()).metrics)
        losses.append(meter.take(runtime)["loss"])
    return {
        "losses": losses,
        "tensors": {name: tensor.clone() for name, tensor in state.tensors().items()},
        "features": features_of(state.model.float(), images.images_NHWC, runtime),
    }


def work(rank: int, world_size: int, meeting: str, noisy: str, save: str) -> None:
    torch.set_default_dtype(torch.float64)
    place = {"rank": rank, "world_size": world_size}
    with ExitStack() as stack:
        if world_size > 1:
            stack.enter_context(process_group("gloo", init_method=f"file://{meeting}", **place))
        runtime = stack.enter_context(member_runtime(**place, device=torch.device("cpu")))
        result = train(runtime, noisy=noisy)
    if runtime.is_main:
        torch.save(result, Path(save))


def main() -> None:
    folder, *names = sys.argv[1:]
    for name in names:
        world_size, noise, *_ = name.split("-")
        arguments = (int(world_size), f"{folder}/{name}.meeting", noise, f"{folder}/{name}")
        if code := exit_code(work, int(world_size), *arguments):
            sys.exit(code)


if __name__ == "__main__":
    main()
