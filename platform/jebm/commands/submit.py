r"""Run a command as a job of a cluster, and again if the cluster's head or the job is lost on the way.

  export RAY_ADDRESS=http://127.0.0.1:8265
  jebm submit --runtime-env cluster/runtime-env.yaml -- \
      python jobs/train.py --config jobs/configs/smoke.yaml --run.storage s3://bucket/runs

It sends this folder along (without what .gitignore and .rayignore name), and prints the job's log. If the
head is lost, it waits until there is one again; then it sends the same command again, which resumes the run.
It does so as well if the job died of something that a restart may cure. Ctrl-C leaves the job running and
names the command that stops it. `ray job submit` does all of this once.

Exit code: the job's own; 3: stopped; 130: Ctrl-C. Not sent again: 0, 2 within ten minutes of the first try (a
wrong value), 3, divergence, and a driver that a signal ended.
"""

import os
import shlex
import sys
from pathlib import Path

from jebm.cli import log_lines
from jebm.errors import ConfigError
from jebm.on_ray.submission import supervise
from jebm.parser import job_parser, parse
from jebm.parser.yaml_file import read_yaml

__all__ = ["main"]

_EXAMPLE = "jebm submit -- python jobs/train.py --config …"


def main() -> int:
    """Send the job, follow it, and return its exit code."""
    log_lines()
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = job_parser(__doc__ or "")
    parser.usage = "%(prog)s [--runtime-env FILE] [--restarts N] -- COMMAND ..."
    parser.add_argument("--runtime-env", type=Path, help="YAML file: what the job brings along, as in Ray")
    parser.add_argument("--restarts", type=int, default=10, help="how often to send it again")
    arguments = parse(parser, words[:cut])
    command = words[cut + 1 :]
    if not command:
        raise ConfigError(f"COMMAND: missing; write it after two dashes: {_EXAMPLE}")
    if arguments.restarts < 0:
        raise ConfigError("restarts: must not be negative")
    address = os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS: {address or 'unset'} is no job server's address; write http://HOST:8265"
        )
    added = {}
    if arguments.runtime_env is not None:
        added = read_yaml(arguments.runtime_env, "env_vars: {NAME: value}")
    return supervise(address, shlex.join(command), {"working_dir": "."} | added, arguments.restarts)
