"""A user's folder with a module of their own, as the working directory."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

MYLAB = '''
import torch
from torch import Tensor, nn
from jebm.parts import Energy, Features, Generator, Inference, Likelihood, Reader, Shapes


class SumEnergy(Energy):
    """A sum over layers of a small net each."""

    def __init__(self, layers, width: int = 20, slopes: tuple[float, ...] = (), name: str | None = None):
        super().__init__(layers)
        self.slopes, self.name = slopes, name
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(d, width), nn.SiLU(), nn.Linear(width, 1)) for d in self.widths
        )

    def forward(self, z: Tensor) -> Tensor:
        parts = torch.split(z, self.widths, 1)
        return torch.stack([net(part) for net, part in zip(self.nets, parts)]).sum(0).squeeze(1)


class Flat(Generator):
    def __init__(self, shapes: Shapes, width: int):
        super().__init__(shapes)
        self.body = nn.Sequential(
            nn.Linear(sum(shapes.dims), width),
            nn.Tanh(),
            nn.Linear(width, shapes.outputs * shapes.image[1] * shapes.image[2]),
            nn.Unflatten(1, (shapes.outputs, *shapes.image[1:])),
        )

    def forward(self, code: Tensor) -> Tensor:
        return self.body(code)


class Means(Features):
    """Means of edge x edge blocks, and noise by fixed random weights."""

    def __init__(self, image, edge: int = 2):
        super().__init__(image)
        self.pool = nn.AdaptiveAvgPool2d(edge)
        self.last = nn.Linear(image[0] * edge**2, 3)

    def forward(self, x: Tensor) -> Tensor:
        means = self.pool(x).flatten(1)
        return torch.cat([means, self.last(means)], 1)


class Whole(Features):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Scans(Reader):
    """Text files of numbers; the label stands in the name."""

    def __init__(self, path, invert: bool = False):
        super().__init__(path)
        self.invert = invert

    def images(self):
        import numpy
        for file in sorted(self.path.glob("*.txt")):
            image = numpy.loadtxt(file).astype(numpy.uint8)
            yield 255 - image if self.invert else image, int(file.name[0])


class Mixed(Reader):
    """As its path says: floats, two shapes, an error, or nothing."""

    def images(self):
        import numpy
        if self.path.name != "nothing":
            yield numpy.zeros((4, 4), "f8" if self.path.name == "floats" else "u1"), 0
        if self.path.name == "shapes":
            yield numpy.zeros((4, 5), "u1"), 0
        if self.path.name == "error":
            raise KeyError("no such scan")
        if self.path.name == "labels":
            yield numpy.zeros((4, 4), "u1"), "cat"


class Unfinished(Energy):
    pass


class Stranger(nn.Linear):
    pass


class Broken(Energy):
    def __init__(self, layers):
        super().__init__(layers)
        raise RuntimeError("no luck")

    def forward(self, z: Tensor) -> Tensor:
        return z.sum(1)


def make(layers):
    return SumEnergy(layers)
'''


@pytest.fixture
def mylab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder; an import of its mylab leaves imported.txt."""
    folder = tmp_path / "mine"
    folder.mkdir()
    trace = "import pathlib\n(pathlib.Path(__file__).parent / 'imported.txt').touch()\n"
    (folder / "mylab.py").write_text(trace + MYLAB, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    sys.modules.pop("mylab", None)
    yield folder
    sys.modules.pop("mylab", None)
