r"""Compare priors fairly: train each arm with each seed, evaluate every model, test paired differences.

  on this machine:   jebm compare --config jobs/configs/fashion_mnist.yaml \
                       --arms '[gaussian, joint, top, two_stage]' --seeds '[5, 6, 7, 8, 9]'
  on a cluster:      ray job submit --working-dir . -- python jobs/compare.py --config … \
                       --run.storage s3://bucket/prefix --cluster.engine ray
  show the plan:     … --dry-run

Arms differ only in this:
  gaussian           the prior is N(0, I); always needed as the baseline
  joint              one energy over all latent layers, trained together with the nets
  top                an energy over only the top layer of the same ladder
  two_stage          a joint energy on the frozen nets of the finished gaussian run of the same seed
  NAME=KEY:VALUE,…   joint with some keys changed, e.g. 'wide=energy.width:200,optimizer.energy.lr:3e-4'

For each seed, all arms start from the same weights of generator and inference net and see the same images and
noise in the same order. Any key can be set; all arms share it. The runs are RUN.NAME-ARM-SEED in run.storage.
By default they train one after another in this process (with cluster.workers 1), with --parallel N in N
processes, with --cluster.engine ray on a cluster.

Writes to --output: rows/RUN.json for each model, numbers.json, and the report comparison.html, .md, .json.
The same command resumes a comparison that was stopped or killed; finished work is not repeated.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace

from jsonargparse import Namespace

from jebm.campaign.rows import PriorMeasures, Rows
from jebm.campaign.runs import rows_of, train_here
from jebm.campaign.trials import ARMS, Trial, check_trials, describe, trials_of
from jebm.cli import STOPPED, log_lines, tell
from jebm.config import Config, config_to_dict
from jebm.errors import ConfigError
from jebm.evaluate.comparison import compare, document
from jebm.evaluate.comparison_findings import comparison_findings
from jebm.evaluate.measures import long_factor
from jebm.parser import argument_parser, parse_arguments
from jebm.report.write import finite, write_report
from jebm.store.storage import open_store
from jebm.train.provenance import provenance
from jebm.train.runtime import device_here, prepare_process
from jebm.untrusted import escaped

__all__ = ["main"]


def main() -> int | None:
    """Parse, check, train, evaluate, compare; return `STOPPED` if a signal stopped it, None if dry."""
    log_lines()
    config, arguments = _settings()
    trials = trials_of(config, arguments.arms, arguments.seeds)
    check_trials(trials, deep=arguments.dry_run)
    here = config.cluster.engine == "process"
    if not here:
        # Imported only here, so that other engines do not need ray.
        from jebm.on_ray.cluster import check_room  # noqa: PLC0415
        from jebm.on_ray.trainer import train  # noqa: PLC0415

        if arguments.dry_run and not all(trial.finished() for trial in trials):
            check_room(config)
    place = arguments.output or f"{config.run.storage.rstrip('/')}/{config.run.name}-comparison"
    where = f"{escaped(config.run.storage)}, results in {escaped(place)}"
    tell(f"{len(trials)} runs in {where}\n{describe(trials)}")
    output = open_store(place)
    output.probe()
    if arguments.dry_run:
        return None

    # Train and evaluate what is missing.
    prepare_process(config, device_here(config))
    measures = PriorMeasures(config)
    trainer = train_here if here else lambda trial, _: train(trial.config, provenance(trial.config))
    found = rows_of(trials, Rows(output, measures), parallel=arguments.parallel, train=trainer)
    if found is None:
        tell("stopped; the same command resumes it")
        return STOPPED

    # Compare the arms.
    arms = dict.fromkeys(trial.arm for trial in trials)
    rows = {arm: {trial.seed: found[trial.key] for trial in trials if trial.arm == arm} for arm in arms}
    comparison = compare(rows, len(config.model.latent_dims))
    facts = _facts(config, trials, measures)
    contents = {
        **document(comparison),
        "rows": {arm: {str(seed): row for seed, row in of_arm.items()} for arm, of_arm in rows.items()},
        "facts": facts,
        "provenance": provenance(),
        "config": config_to_dict(config),
        "runs": {trial.name: trial.uri for trial in trials},
    }
    output.put("numbers.json", json.dumps(finite(contents), indent=1, ensure_ascii=False).encode())
    write_report(comparison_findings(comparison, facts, config), output, "comparison")
    tell("\n".join(claim.sentence for claim in comparison.claims))
    tell(f"report   {escaped(place)}/comparison.html")
    return 0


def _settings() -> tuple[Config, Namespace]:
    """Return the command line's config and arguments; raises ConfigError."""
    parser = argument_parser(__doc__ or "")
    parser.usage = "%(prog)s [--config FILE] [--arms LIST] [--seeds LIST] [--KEY VALUE ...]"
    parser.set_defaults({"cluster.engine": "process"})
    parser.add_argument("--arms", type=list[str], default=list(ARMS), help="what is compared, see above")
    parser.add_argument("--seeds", type=list[int], default=[*range(5)], help="run.seed of each repetition")
    parser.add_argument("--output", help="folder or s3://…; default run.storage/RUN.NAME-comparison")
    parser.add_argument("--parallel", type=int, default=1, help="runs that train side by side here")
    parser.add_argument(
        "--dry-run", action="store_true", help="check all that a start checks, say what would be trained"
    )
    config, arguments = parse_arguments(parser)
    if arguments.parallel < 1:
        raise ConfigError("--parallel: must be at least 1")
    if config.cluster.engine == "process":
        return replace(config, cluster=replace(config.cluster, workers=1, min_workers=None)), arguments
    if arguments.parallel > 1:
        raise ConfigError("--parallel: is for cluster.engine process; a cluster has cluster.workers")
    from jebm.on_ray.places import resolve_paths  # noqa: PLC0415  (without Ray: no ray needed)

    return resolve_paths(config), arguments


def _facts(config: Config, trials: Sequence[Trial], measures: PriorMeasures) -> dict[str, str]:
    """Return where the figures come from, as lines for people."""
    seeds = sorted({trial.seed for trial in trials})
    steps = sorted({trial.total_steps for trial in trials})
    made = provenance()
    versions = ("python", "torch", "ray", "numpy", "machine")
    held_out = measures.held_out.manifest
    return {
        "budget of each run": " or ".join(f"{count:,}" for count in steps)
        + f" updates of {config.train.batch_size} images",
        "seeds": ", ".join(map(str, seeds)),
        "chains": f"{config.langevin.steps} steps of size {config.langevin.step_size:g}; long ones "
        f"{long_factor(config) * config.langevin.steps:,}",
        "training images": config.data.train,
        "held-out images": f"{held_out.images:,} of {config.data.held_out or config.data.train} for the "
        f"likelihood, the first {min(held_out.images, config.evaluation.samples):,} for distances, "
        f"sha256 {held_out.sha256[:12]}",
        "prior samples": f"{config.evaluation.samples:,} of each model",
        "features": f"{measures.net.name}, sha256 {measures.net.sha256}",
        "command": f"`{shlex.join(['jebm', 'compare', *sys.argv[1:]])}`",
        "git revision": made["git_revision"],
        "source": f"jebm {made['jebm']}, sha256 {made['source_sha256'][:12]}",
        "versions": ", ".join(f"{name} {made[name]}" for name in versions),
    }
