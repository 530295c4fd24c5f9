"""From errors to exit codes, and from the package's log to lines: the same for every job."""

import logging
import sys
from collections.abc import Callable
from typing import NoReturn

from jebm.errors import CheckpointError, ConfigError, DataError, JebmError, StoreError

__all__ = ["log_lines", "run"]


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and leave the process: with its result (None is 0), or with one line on stderr.

    Exit code 2 for what the user can put right before anything was lost (ConfigError, DataError,
    StoreError, CheckpointError); 1 for any other JebmError, its kind before the message (`diverged: …`);
    130 on Ctrl-C. Anything else is a bug of ours and keeps its traceback.
    """
    try:
        code = main() or 0
    except (CheckpointError, ConfigError, DataError, StoreError) as error:
        code = _report("error", error, 2)
    except JebmError as error:
        code = _report(type(error).__name__.removesuffix("Error").lower(), error, 1)
    except KeyboardInterrupt:
        code = _report("interrupted", "", 130)
    sys.exit(code)


def log_lines() -> None:
    """Print this package's log, from INFO up, as bare lines on stdout; other packages' warnings as well."""
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger().setLevel(logging.WARNING)  # also where somebody has set up the log before
    logging.getLogger("jebm").setLevel(logging.INFO)


def _report(kind: str, error: Exception | str, code: int) -> int:
    message = " ".join(str(error).split())
    sys.stderr.write(f"{kind}: {message}\n" if message else f"{kind}\n")
    return code
