"""Compare runs on one offline page: differing keys, curves, pictures, evaluations.

  jebm compare-runs runs/a runs/b
  jebm compare-runs s3://bucket/runs/a s3://bucket/runs/b runs/c --output pages/abc

Writes runs.html, and the same as runs.md and runs.json, with the pictures. Runs whose configs differ only in
run.seed are also shown as means with intervals. To test whether priors differ, use jebm compare.

Exit code 0: page written; 2: usage error, no run there, or a storage cannot be reached.
"""

from jebm.campaign.side_by_side import side_by_side
from jebm.campaign.traces import read_traces
from jebm.cli import log_lines, tell
from jebm.errors import ConfigError
from jebm.parser import job_parser, parse
from jebm.report.write import write_report
from jebm.store.storage import open_store

__all__ = ["main"]

_MOST_RUNS = 12  # lines and columns of more cannot be told apart


def main() -> None:
    """Look at the output, read the runs and write the page."""
    log_lines()
    parser = job_parser(__doc__ or "")
    parser.add_argument("runs", type=str, nargs="+", help="run.storage/run.name of each")
    parser.add_argument("--output", type=str, default="comparison", help="folder or s3://… to write to")
    arguments = parse(parser)
    if not 2 <= len(arguments.runs) <= _MOST_RUNS:
        raise ConfigError(f"give 2 to {_MOST_RUNS} runs; there are {len(arguments.runs)}")
    output = open_store(arguments.output)
    output.probe()
    write_report(side_by_side(read_traces(arguments.runs)), output, "runs")
    tell(f"page     {output.uri.removeprefix('file://')}/runs.html")
