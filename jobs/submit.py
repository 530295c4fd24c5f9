"""`jebm submit` where jebm is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from jebm.commands import run_command

if __name__ == "__main__":
    run_command("submit")
