"""Check this machine and a storage (credentials, permissions, objects), or the nodes of a cluster.

  jebm doctor s3://bucket/prefix
  AWS_PROFILE=training jebm doctor s3://bucket/prefix --json
  jebm doctor --gpu    on a node of each type of the cluster in RAY_ADDRESS, or on this machine: driver, CUDA,
                       NCCL, Triton, C compiler, room for decoded images

Prints one line per check: ok, warn (works, with a limit) or FAIL with the remedy. Leaves nothing behind.
Exit code 0: no FAIL; 1: some; 2: usage error, or no server answers.
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict

from jebm.cli import log_lines, table, tell, tell_json
from jebm.errors import ConfigError
from jebm.parser import job_parser, parse
from jebm.store.diagnose import Check, examine
from jebm.train.machine import kernel_check

__all__ = ["main"]


def main() -> int | None:
    """Run all checks, print them and return the exit code, None if all is well."""
    log_lines(logging.ERROR, sys.stderr)  # the checks report their own findings
    parser = job_parser(__doc__ or "")
    parser.add_argument(
        "place", type=str | None, nargs="?", default=None, help="run.storage: s3://bucket/prefix or a folder"
    )
    parser.add_argument("--gpu", action="store_true", help="the cluster's nodes, and what their GPUs need")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parse(parser)
    if arguments.place is None and not arguments.gpu:
        raise ConfigError("place: is missing (run.storage: s3://bucket/prefix or a folder), or --gpu")
    checks, nodes = [], []
    for check in _storage_checks(arguments.place) if arguments.place is not None else ():
        checks.append(check)
        if not arguments.json:
            tell(f"{_level(check):<4}  {check.name:<15}  {_finding(check)}")
    if arguments.gpu:
        # Imported only here, so that a storage can be checked without ray.
        from jebm.on_ray.examine import examine_nodes  # noqa: PLC0415

        nodes = list(examine_nodes())
        if not arguments.json:
            tell(table([[_level(check), node, check.name, _finding(check)] for node, check in nodes]))
    failed = [check for check in (*checks, *(check for _, check in nodes)) if check.level == "fail"]
    if arguments.json:
        document = {"place": arguments.place, "ok": not failed, "checks": [asdict(check) for check in checks]}
        if arguments.gpu:
            document["nodes"] = [{"node": node, **asdict(check)} for node, check in nodes]
        tell_json(document)
    return 2 if any(check.unreachable for check in failed) else 1 if failed else None


def _storage_checks(place: str) -> Iterator[Check]:
    """Yield the findings on this machine, then those on the storage as they come."""
    yield kernel_check()
    yield from examine(place)


def _level(check: Check) -> str:
    return check.level.upper() if check.level == "fail" else check.level


def _finding(check: Check) -> str:
    return f"{check.finding}; {check.remedy}" if check.remedy else check.finding
