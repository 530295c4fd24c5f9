r"""How the accuracy of the top layer's code grows with training, and where it would be with more.

  python experiments/accuracy_curve.py --rows runs/hierarchy/rows --arms gaussian long7 long20 \
    --at 17160 34320 --target 0.86 --plot docs/pictures/accuracy.svg

Reads the rows of experiments/hierarchy.py, all of one recipe with different train.epochs. Fits a power law,
1 - accuracy = a updates^-b, by least squares of the logarithms over all runs, and prints b with its 95 %
interval, the accuracy that it predicts at each budget of --at with the 95 % interval of one more run, and the
updates at which it predicts --target. A power law has no floor: where the code cannot tell all, the
predictions are too high.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from scipy import stats

from jebm.report.plots import COLOURS, svg_of

_LINE_POINTS = 50


class Law(NamedTuple):
    """1 - accuracy = exp(intercept) updates^-exponent, fitted to N runs."""

    updates_N: list[int]
    accuracy_N: list[float]
    intercept: float
    exponent: float
    exponent_error: float
    spread: float
    """Standard deviation of log(1 - accuracy) around the line, N - 2 degrees of freedom."""

    def predicted(self, updates: float) -> tuple[float, float, float]:
        """Return the accuracy after so many updates, and the 95 % interval of one more run."""
        x_N, x = np.log(self.updates_N), math.log(updates)
        off = (x - x_N.mean()) ** 2 / ((x_N - x_N.mean()) ** 2).sum()
        half = self.quantile * self.spread * math.sqrt(1 + 1 / len(x_N) + off)
        middle = self.intercept - self.exponent * x
        low, high = (1 - math.exp(middle + sign * half) for sign in (1, -1))
        return 1 - math.exp(middle), low, high

    @property
    def quantile(self) -> float:
        """Of Student's t, for intervals of 95 %."""
        return float(stats.t.ppf(0.975, len(self.updates_N) - 2))

    def needed(self, accuracy: float) -> float:
        """Return the updates at which it predicts an accuracy."""
        return math.exp((self.intercept - math.log(1 - accuracy)) / self.exponent)


def fitted(points: list[tuple[int, float]]) -> Law:
    """Return the law of (updates, accuracy) of at least three runs of at least two lengths."""
    updates_N, accuracy_N = (list(column) for column in zip(*sorted(points), strict=True))
    x_N, y_N = np.log(updates_N), np.log1p(-np.array(accuracy_N))
    line = stats.linregress(x_N, y_N)
    left_N = y_N - line.intercept - line.slope * x_N
    spread = math.sqrt(float((left_N**2).sum()) / (len(x_N) - 2))
    return Law(updates_N, accuracy_N, line.intercept, -line.slope, line.stderr, spread)


def drawn(law: Law, furthest: float, target: float) -> bytes:
    """Return the runs, the law and its intervals as SVG."""

    def draw(canvas: Figure) -> None:
        axes: Axes = canvas.subplots()
        x = np.geomspace(min(law.updates_N), furthest, _LINE_POINTS)
        middle, low, high = np.array([law.predicted(each) for each in x]).T
        axes.fill_between(x, low, high, color=COLOURS[0], alpha=0.15, label="95 % of single runs")
        axes.plot(x, middle, color=COLOURS[0], label="power law")
        axes.plot(law.updates_N, law.accuracy_N, "o", color=COLOURS[1], label="runs")
        axes.axhline(target, color=COLOURS[5], linestyle="--", label=f"{target:g}")
        axes.set(xscale="log", xlabel="updates", ylabel="accuracy of the top code")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend()

    return svg_of(draw)


def main() -> None:
    """Fit, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, required=True, help="OUTPUT/rows of experiments/hierarchy.py")
    parser.add_argument("--arms", nargs="+", required=True, help="arms, alike but for train.epochs")
    parser.add_argument("--layer", type=int, default=3, help="the top layer, counted from 1")
    parser.add_argument("--at", type=int, nargs="+", default=[], help="updates to predict the accuracy at")
    parser.add_argument("--target", type=float, default=0.86, help="an accuracy to reach")
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    arguments = parser.parse_args()
    points = []
    for path in sorted(arguments.rows.glob("*.json")):
        content = json.loads(path.read_text())
        if content["identity"]["run"].split("-")[-2] in arguments.arms and content["row"]:
            points.append((content["identity"]["steps"], content["row"][f"accuracy_{arguments.layer}"]))
    if len(points) < 3 or len({updates for updates, _ in points}) < 2:
        sys.exit(f"--arms: {len(points)} runs in {arguments.rows}; needs three, of two lengths")
    law = fitted(points)
    half = law.quantile * law.exponent_error
    print(f"{len(points)} runs: 1 - accuracy = {math.exp(law.intercept):.3f} updates^-b")
    print(f"b = {law.exponent:.3f} ± {half:.3f}")
    for updates in arguments.at:
        middle, low, high = law.predicted(updates)
        print(f"{updates:,} updates: {middle:.3f} [{low:.3f}, {high:.3f}]")
    print(f"{arguments.target:g} at {law.needed(arguments.target):,.0f} updates")
    if arguments.plot:
        furthest = max(*law.updates_N, *arguments.at, law.needed(arguments.target))
        arguments.plot.write_bytes(drawn(law, furthest, arguments.target))


if __name__ == "__main__":
    main()
