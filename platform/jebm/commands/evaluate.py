r"""Evaluate a checkpoint and write a report: one page with figures, tables, curves and pictures.

  quick look:        jebm evaluate --checkpoint runs/fashion_mnist
  all experiments:   … --suite paper --out-of-distribution digits=data/mnist_digits/test
  some of them:      … --suite likelihood chains
  another step:      … --checkpoint runs/fashion_mnist/checkpoints/step-00001200-a0001
  on two processes:  torchrun --nproc-per-node 2 -m jebm evaluate --checkpoint …
  on a cluster:      ray job submit --working-dir . -- python jobs/evaluate.py --engine ray --workers 8 \
                       --checkpoint s3://bucket/prefix/name

Suites: quick (likelihood, samples, hierarchy in pictures, chains) and paper (all, in full); or names of
measures: likelihood, samples, hierarchy, factors, ood, chains, each in full (see docs/evaluation.md). paper
leaves factors out where the data have none. The figures do not depend on the number of workers. The run is
not changed.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from jsonargparse import Namespace

from jebm.cli import log_lines, tell
from jebm.config import INCEPTION_FILE, Cluster, Config, Features, Train, require_seed
from jebm.core.by_class import named_modules
from jebm.errors import ConfigError
from jebm.evaluate.share import group_share
from jebm.evaluate.suite import Request, check, evaluate_request
from jebm.parser import (
    JobParser,
    add_trust,
    config_from_dict,
    job_parser,
    parse,
    trusted_names,
    word_or_class,
)
from jebm.report.findings import Findings
from jebm.report.write import write_report
from jebm.store.storage import Store, open_store
from jebm.train.provenance import provenance
from jebm.train.runtime import check_cuda, process_runtime, started_by_torchrun

__all__ = ["main"]

_KINDS = get_args(Features.__annotations__["kind"])


def build_parser() -> JobParser:
    """Return the parser of the command line."""
    parser = job_parser(__doc__ or "")
    parser.add_argument(
        "--checkpoint", type=str, required=True, help="run (its newest), or …/checkpoints/NAME"
    )
    parser.add_argument("--suite", type=str, nargs="+", default=["quick"], help="quick, paper, or measures")
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="default: RUN/evaluations/STEP-SUITE; a report there is replaced",
    )
    parser.add_argument("--data", type=str | None, default=None, help="unseen images; default: data.held_out")
    parser.add_argument("--train", type=str | None, default=None, help="where the run's data.train is now")
    parser.add_argument(
        "--samples", type=int, default=10_000, help="of the prior, and at most images of a set"
    )
    parser.add_argument(
        "--out-of-distribution", type=str, nargs="+", default=[], metavar="NAME=URI", help="other images"
    )
    parser.add_argument(
        "--features", type=str | None, default=None, help="where distances are taken: a kind, or your class"
    )
    parser.add_argument(
        "--inception-weights", type=str | None, default=None, metavar="FILE", help="of --features inceptionv3"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise of the evaluation")
    parser.add_argument("--engine", type=Literal["process", "ray"], default="process", help="where it runs")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes; with --engine ray, of one CPU each"
    )
    parser.add_argument("--gpu", action="store_true", help="give each worker one GPU")
    parser.add_argument("--autoscales", action="store_true", help="the cluster adds nodes on demand: wait")
    add_trust(parser)
    return parser


def named_sets(texts: Sequence[str]) -> dict[str, str]:
    """Return name -> URI of NAME=URI, or of a URI alone, which is named by its last part.

    Raises ConfigError for a name that stands twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, _, uri = text.rpartition("=")
        name = name or Path(uri).name
        if name in found:
            raise ConfigError(
                f"--out-of-distribution: {found[name]} and {uri} are both named {name}; give each a name of "
                "its own as NAME=URI"
            )
        found[name] = uri
    return found


def check_report(output: Store) -> None:
    """Check that a report can be written, as `Store.probe`, and say if it replaces one."""
    output.probe()
    if output.head("evaluation.json") is not None:
        tell(f"replaces the report in {output.uri.removeprefix('file://')}")


def evaluate_here(request: Request, arguments: Namespace, output: Store) -> Findings | None:
    """Evaluate in this process or as one of torchrun's; None if another process writes to the output."""
    workers = int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else 1
    if arguments.workers not in (1, workers):
        raise ConfigError(f"workers: {arguments.workers} processes need torchrun, or --engine ray")
    if arguments.gpu:
        check_cuda("--gpu", "leave it out")
    cluster = Cluster("process", workers, cpus_per_worker=torch.get_num_threads())
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if arguments.gpu else "cpu"
    with process_runtime(Config(train=Train(batch_size=workers), cluster=cluster)) as runtime:
        with runtime.together():
            if runtime.is_main:
                check_report(output)
        share = group_share()
        findings = evaluate_request(request, device=device, share=share, provenance=provenance())
        return findings if runtime.is_main else None


def main() -> None:
    """Parse, check, evaluate, write the report and print where it is."""
    log_lines()
    arguments = parse(build_parser())
    require_seed(arguments.seed, "--seed")
    weights = arguments.inception_weights
    # The net that this command line names, and so trusts; weights may also come from the run's config.
    net = word_or_class(arguments.features or "classifier", "--features", _KINDS)
    named = config_from_dict(
        {"evaluation": {"features": net, "inception_weights": weights or INCEPTION_FILE}}
    )
    request = Request(
        checkpoint=arguments.checkpoint,
        suite=tuple(arguments.suite),
        data=arguments.data,
        train=arguments.train,
        out_of_distribution=named_sets(arguments.out_of_distribution),
        features=named.evaluation.features if arguments.features else None,
        inception_weights=weights and str(Path(weights).absolute()),  # workers may run in another folder
        samples=arguments.samples,
        seed=arguments.seed,
        trusted=(*trusted_names(arguments), *named_modules(named)),
    )
    if arguments.engine == "ray":
        # Imported only here, so that other engines do not need ray.
        from jebm.on_ray.evaluation import check_output, evaluate_on_ray, resolve_request  # noqa: PLC0415

        request = resolve_request(request)
    checked = check(request)
    name = f"step-{checked.manifest.step:08d}-{'-'.join(request.suite)}"
    place = arguments.output or f"{checked.run}/evaluations/{name}"
    output = open_store(place)
    findings: Findings | None
    if arguments.engine == "ray":
        check_output(place)
        check_report(output)
        gpus, grows = float(arguments.gpu), arguments.autoscales
        cluster = Cluster(workers=arguments.workers, gpus_per_worker=gpus, autoscales=grows)
        findings = evaluate_on_ray(request, cluster, provenance=provenance())
    else:
        findings = evaluate_here(request, arguments, output)
    if findings is None:
        return
    write_report(findings, output, "evaluation")
    tell(f"report   {output.uri.removeprefix('file://')}/evaluation.html")
