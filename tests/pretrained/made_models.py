"""An untrained model as the checkpoint of a run, to be exported."""

from dataclasses import replace

from jebm.config import (
    Config,
    Data,
    Energy,
    Generator,
    Inference,
    Langevin,
    Model,
    Run,
    Train,
    config_to_dict,
)
from jebm.core.model import build_model
from jebm.store.checkpoint import Facts
from jebm.store.retrieve import open_run

CONFIG = Config(
    run=Run(name="mine", storage="s3://secret-bucket/hidden", seed=3),
    data=Data(train="s3://secret-bucket/data/fashion/train", held_out="/home/somebody/test"),
    model=Model(image_size=16, image_channels=1, latent_dims=[2, 3, 4]),
    inference=Inference(channels=[4, 4], width=8),
    generator=Generator(channels=[4, 4], width=8),
    energy=Energy(width=8, output_scale=4.0),
    langevin=Langevin(steps=5, step_size=0.4),
    train=Train(epochs=0.5, batch_size=100),
)


def save(uri: str, config: Config = CONFIG, *, step: int = 7) -> None:
    """Save the config's untrained model, averages included, as a checkpoint of the run at `uri`."""
    model = build_model(config).state_dict()
    tensors = {f"model.{name}": tensor for name, tensor in model.items()}
    # Averages differ from the last weights, so that a test sees which of them were taken.
    averages = build_model(replace(config, run=replace(config.run, seed=4))).state_dict()
    tensors |= {f"ema.{name}": tensor for name, tensor in averages.items()}
    facts = Facts(
        step=step,
        attempt=1,
        state={"data_sha256": "ab" * 32},
        config=config_to_dict(config),
        metrics={"distortion": 1.0, "evaluation/elbo": -230.5},
        provenance={"jebm": "0.1.0", "torch": "2"},
        world_size=2,
        parent=None,
    )
    open_run(uri).checkpoints.save(tensors, facts)
