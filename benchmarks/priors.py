r"""Joint EBM prior against Gaussian prior at equal training: same initial weights, data order, noise.

  python benchmarks/priors.py --config jobs/configs/fashion_mnist.yaml --seeds '[0, 1, 2]' \
    --cluster.engine process --cluster.workers 1 --run.storage runs/priors

Trains two runs a seed by `fit` in this process (any key can be set; the second arm has energy.width 0) and
prints, for the held-out set:
  distortion, rate i  nats per image (the constant of the Gaussian likelihood left out, the same for both)
  ELBO gain           E_q[f] - log Z: what the tilt adds to the ELBO; log Z by importance sampling from p0
  sample size         effective, as a share of its 100,000 samples: how far to trust log Z
  ELBO                gain - distortion - rates, up to that constant
  Frechet             between 10,000 prior samples and the held-out images in the 64 features of a small
                      classifier trained on the same data (lower is better)
  after 2,000 steps   the same for chains of that length: a chain that drifts shows here
  of reconstructions  the same for reconstructions of the held-out images: a floor
"""

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import torch
from torch import Tensor, nn

from jebm.config import Config, Langevin
from jebm.core.model import JointModel
from jebm.core.objective import distortion, reconstruct
from jebm.core.prior import sample_prior
from jebm.data.loader import to_float
from jebm.data.shards import ImageSet, load_images
from jebm.parser import argument_parser, parse_arguments
from jebm.rng import gaussian_noise
from jebm.store.checkpoint import Checkpoints
from jebm.store.storage import open_store
from jebm.train.loop import fit
from jebm.train.provenance import provenance
from jebm.train.runtime import process_runtime
from jebm.train.state import TrainState

Row = dict[str, float]


def trained(config: Config) -> JointModel:
    """Train (or go on training) the run of `config` and return its model."""
    with process_runtime(config) as runtime:
        fit(config, runtime, provenance=provenance())
        state = TrainState.build(config, runtime)
        checkpoints = Checkpoints(open_store(config.run.storage), config.run.name)
        manifest = checkpoints.latest()
        assert manifest is not None
        checkpoints.load(manifest, state.tensors())
    return state.picture_model.requires_grad_(requires_grad=False)


def classifier(images: ImageSet, *, updates: int = 1500) -> nn.Sequential:
    """Return the feature part (64 numbers an image) of a small classifier trained on labelled images."""
    assert images.labels_N is not None
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(images.manifest.channels, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(64),
        nn.ReLU(),
    )
    head = nn.Linear(64, 10)
    features(to_float(images.images_NHWC[:1].copy(), "cpu"))
    optimizer = torch.optim.Adam([*features.parameters(), *head.parameters()], lr=1e-3)
    labels = torch.from_numpy(images.labels_N.copy()).long()
    for _ in range(updates):
        chosen = torch.randint(len(labels), (128,))
        loss = nn.functional.cross_entropy(
            head(features(to_float(images.images_NHWC[chosen.numpy()], "cpu"))), labels[chosen]
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return features.requires_grad_(requires_grad=False)


def moments(features: nn.Sequential, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of the features, float64."""
    h = torch.cat([features(x) for x in batches]).double()
    return h.mean(0), torch.cov(h.T)


def frechet(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
    root = torch.linalg.eigvals(one[1] @ other[1]).real.clamp(min=0).sqrt().sum()
    return float((one[0] - other[0]).square().sum() + one[1].trace() + other[1].trace() - 2 * root)


def evaluate(model: JointModel, config: Config, held_out: ImageSet, features: nn.Sequential) -> Row:
    """Return the figures of one model."""
    normal = gaussian_noise(config.run.seed, 0)(0, "evaluation")
    batches = [
        to_float(held_out.images_NHWC[i : i + 500].copy(), "cpu")
        for i in range(0, len(held_out.images_NHWC), 500)
    ]
    real = moments(features, batches)
    sums: dict[str, list[float]] = {"distortion": [], "f": []}
    rates: list[Tensor] = []
    for x in batches:
        posterior = model.inference(x)
        z = posterior.rsample(normal(*posterior.mean_BD.shape))
        sums["distortion"].append(float(distortion(model, x, model.generator(z)).mean()))
        sums["f"].append(float(model.energy(z).mean()) if model.energy else 0.0)
        rates.append(
            torch.stack([part.sum(1).mean() for part in posterior.rate().split(model.latent_dims, 1)])
        )
    row = {"distortion": statistics.fmean(sums["distortion"])}
    row |= {f"rate {i}": float(rate) for i, rate in enumerate(torch.stack(rates).mean(0), 1)}
    row["ELBO gain"], row["sample size"] = 0.0, 1.0
    if model.energy is not None:
        f = model.energy(normal(100_000, model.latent_dim)).double()
        row["ELBO gain"] = statistics.fmean(sums["f"]) - float(f.logsumexp(0) - math.log(len(f)))
        row["sample size"] = float((2 * f.logsumexp(0) - (2 * f).logsumexp(0)).exp() / len(f))
    row["ELBO"] = (
        row["ELBO gain"] - row["distortion"] - sum(row[f"rate {i}"] for i in range(1, len(rates[0]) + 1))
    )

    def samples(langevin: Langevin) -> list[Tensor]:
        return [model.generator(sample_prior(model, langevin, 500, normal)[0]) for _ in range(20)]

    row["Frechet"] = frechet(moments(features, samples(config.langevin)), real)
    longer = dataclasses.replace(config.langevin, steps=2000)
    row["after 2,000 steps"] = frechet(moments(features, samples(longer)), real)
    row["of reconstructions"] = frechet(moments(features, [reconstruct(model, x) for x in batches]), real)
    return row


def interval(values: list[float]) -> str:
    """Return the mean with the half width of its 95 % t-interval."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    quantile = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
    half = quantile[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.2f} ± {half:.2f}"


def main() -> None:
    """Train, measure, print a Markdown table."""
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--seeds", type=list[int], default=[0, 1, 2])
    config, arguments = parse_arguments(parser)
    features = classifier(load_images(open_store(config.data.train)))
    held_out = load_images(open_store(config.data.held_out or config.data.train))
    arms: dict[str, Callable[[Config], Config]] = {
        "EBM": lambda c: c,
        "Gaussian": lambda c: dataclasses.replace(c, energy=dataclasses.replace(c.energy, width=0)),
    }
    rows: dict[str, list[Row]] = {arm: [] for arm in arms}
    for seed in arguments.seeds:
        for arm, change in arms.items():
            run = dataclasses.replace(config.run, seed=seed, name=f"{config.run.name}-{arm.lower()}-{seed}")
            arm_config = change(dataclasses.replace(config, run=run))
            rows[arm].append(evaluate(trained(arm_config), arm_config, held_out, features))
            print(arm, seed, json.dumps(rows[arm][-1]), flush=True)
    print("\n| | EBM prior | Gaussian prior | difference, paired |\n|---|---|---|---|")
    for name in rows["EBM"][0]:
        ebm, gaussian = ([row[name] for row in rows[arm]] for arm in arms)
        difference = [a - b for a, b in zip(ebm, gaussian, strict=True)]
        print(f"| {name} | {interval(ebm)} | {interval(gaussian)} | {interval(difference)} |")


if __name__ == "__main__":
    main()
