r"""Joint EBM prior against Gaussian prior at equal training: same initial weights, data order, noise.

  python benchmarks/priors.py --config jobs/configs/fashion_mnist.yaml --seeds '[0, 1, 2]' \
    --cluster.engine process --cluster.workers 1 --run.storage runs/priors

Trains two runs a seed by `fit` in this process (any key can be set; the second arm has energy.width 0) and
prints, for the held-out set:
  distortion, rate i  nats per image
  ELBO gain           E_q[f] - log Z: what the tilt adds to the ELBO; log Z by annealed importance sampling
  ELBO                gain - distortion - rates
  active units        latents, of all layers, whose posterior mean moves
  log Z gap           an upper bound of log Z (annealing in reverse) less the one that is used, a lower bound
  sample size         effective, as a share of the annealed chains: how far to trust log Z
  acceptance          that a Metropolis check of the Langevin steps would have
  drift               of mean f from langevin.steps to evaluation.chain_factor times as many
  Frechet             between evaluation.samples prior samples and as many held-out images, in the features
                      that evaluation.features names (lower is better)
  Frechet, long chains
                      the same for chains evaluation.chain_factor times as long
  of reconstructions  the same for reconstructions of the held-out images
  of real images      of one half of them against the other: a floor
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

from jebm.config import Config
from jebm.core.model import JointModel
from jebm.data.loader import to_float
from jebm.data.shards import ImageSet, load_images
from jebm.evaluate.chains import Estimate, Tilt, chain_report, warnings_of
from jebm.evaluate.features import FeatureNet, feature_net
from jebm.evaluate.likelihood import likelihood, log_partition_annealed, log_partition_reverse
from jebm.evaluate.samples import image_features, sample_quality
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


@torch.no_grad()
def evaluate(model: JointModel, config: Config, held_out: ImageSet, net: FeatureNet) -> Row:
    """Return the figures of one model; prints where its sampler is not valid."""
    noise = gaussian_noise(config.run.seed, 0)
    images_NHWC = held_out.images_NHWC
    log_z, sampler = (
        Estimate(0.0, 0.0),
        {"log Z gap": 0.0, "sample size": 1.0, "acceptance": 1.0, "drift": 0.0},
    )
    if model.energy is not None:
        tilt = Tilt(model.energy, model.generator.latents)
        lower = log_partition_annealed(tilt, model.latent_dim, noise(0, "log Z"))
        upper = log_partition_reverse(tilt, lower.end_BD, noise(0, "log Z, reverse"))
        report = chain_report(
            tilt,
            noise(0, "chain start")(500, model.latent_dim),
            noise(0, "chain"),
            config.langevin,
            factor=config.evaluation.chain_factor,
        )
        for line in warnings_of(report):
            print(line)
        log_z = lower.log_z
        sampler = {
            "log Z gap": upper.log_z.value - lower.log_z.value,
            "sample size": lower.effective_share,
            "acceptance": report.acceptance,
            "drift": report.f_drift.value,
        }
    batches = (to_float(images_NHWC[i : i + 500].copy(), "cpu") for i in range(0, len(images_NHWC), 500))
    figures = likelihood(model, batches, noise, log_z)
    compared_NHWC = images_NHWC[: config.evaluation.samples]
    quality = sample_quality(
        model,
        config.langevin,
        compared_NHWC,
        image_features(compared_NHWC, net),
        net,
        noise,
        count=config.evaluation.samples,
        chain_factor=config.evaluation.chain_factor,
    )
    return {
        "distortion": figures.distortion.value,
        **{f"rate {i}": rate.value for i, rate in enumerate(figures.rate_L, 1)},
        "ELBO gain": figures.gain.value,
        "ELBO": figures.elbo.value,
        "active units": sum(figures.active_units),
        **sampler,
        "Frechet": quality["samples"]["frechet"],
        "Frechet, long chains": quality["samples_long"]["frechet"],
        "of reconstructions": quality["reconstructions"]["frechet"],
        "of real images": quality["real_floor"]["frechet"],
    }


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
    net = feature_net(config.evaluation.features, load_images(open_store(config.data.train)))
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
            rows[arm].append(evaluate(trained(arm_config), arm_config, held_out, net))
            print(arm, seed, json.dumps(rows[arm][-1]), flush=True)
    print("\n| | EBM prior | Gaussian prior | difference, paired |\n|---|---|---|---|")
    for name in rows["EBM"][0]:
        ebm, gaussian = ([row[name] for row in rows[arm]] for arm in arms)
        difference = [a - b for a, b in zip(ebm, gaussian, strict=True)]
        print(f"| {name} | {interval(ebm)} | {interval(gaussian)} | {interval(difference)} |")


if __name__ == "__main__":
    main()
