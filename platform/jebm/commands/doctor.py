"""Check this machine and a storage: credentials, permissions, and how it handles objects.

  jebm doctor s3://bucket/prefix
  AWS_PROFILE=training jebm doctor s3://bucket/prefix --json

Prints one line per check: ok, warn (works, with a limit) or FAIL with the remedy. Leaves nothing behind.
Exit code 0: no FAIL; 1: some; 2: usage error, or no server answers.
"""

import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict

from jebm.cli import log_lines, tell, tell_json
from jebm.core.chain import cpu_kernel
from jebm.parser import job_parser, parse
from jebm.store.diagnose import Check, examine

__all__ = ["main"]


def kernel_check() -> Check:
    """Report which kernel computes Langevin chains on this machine's CPU."""
    compiled, description = cpu_kernel()
    if compiled:
        return Check("chain kernel", "ok", description)
    remedy = "install a C compiler (gcc, or: pip install ziglang); it computes chains up to 3 times faster"
    return Check("chain kernel", "warn", description, remedy)


def all_checks(place: str) -> Iterator[Check]:
    """Yield the findings on this machine, then those on the storage as they come."""
    yield kernel_check()
    yield from examine(place)


def main() -> int:
    """Run all checks, print them and return the exit code."""
    log_lines(logging.ERROR, sys.stderr)  # the checks report their own findings
    parser = job_parser(__doc__ or "")
    parser.add_argument("place", type=str, help="run.storage: s3://bucket/prefix or a folder")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parse(parser)
    checks = []
    for check in all_checks(arguments.place):
        checks.append(check)
        if not arguments.json:
            level = check.level.upper() if check.level == "fail" else check.level
            remedy = f"; {check.remedy}" if check.remedy else ""
            tell(f"{level:<4}  {check.name:<15}  {check.finding}{remedy}")
    failed = [check for check in checks if check.level == "fail"]
    if arguments.json:
        document = {"place": arguments.place, "ok": not failed, "checks": [asdict(check) for check in checks]}
        tell_json(document)
    return 2 if any(check.unreachable for check in failed) else 1 if failed else 0
