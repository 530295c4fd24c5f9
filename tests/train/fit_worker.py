"""One of several processes: `fit_worker.py PATIENCE CONFIG...` fits each config in turn.

Where it stands it finds in torchrun's variables. PATIENCE is that of background saves, in seconds.
"""

import functools
import sys

from jebm.cli import log_lines
from jebm.parser import load_config
from jebm.store.writer import AsyncWriter
from jebm.train import loop, saver
from jebm.train.runtime import process_runtime


def main() -> None:
    patience, *files = sys.argv[1:]
    log_lines()
    saver.AsyncWriter = functools.partial(AsyncWriter, patience_seconds=float(patience))  # type: ignore[misc,assignment]
    configs = [load_config(file) for file in files]
    with process_runtime(configs[0]) as runtime:
        for config in configs:
            loop.fit(config, runtime, provenance={})


if __name__ == "__main__":
    main()
