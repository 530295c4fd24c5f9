"""InceptionV3 with weights from a file: the figures are torch-fidelity's; another file is refused.

Weights are random here: the known ones come with no package.

Shapes: N images, C channels, H height, W width, F features.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jebm.config import Config, Data, Evaluation, Features, Train
from jebm.data.dataset import ImageSet
from jebm.data.manifest import read_manifest
from jebm.errors import ConfigError
from jebm.evaluate.distances import Moments, frechet_distance
from jebm.evaluate.features import feature_net, is_fid
from jebm.evaluate.features.inception import InceptionFeatures, inception_features
from jebm.evaluate.quick import check_quick_look
from jebm.store.storage import open_store

FASHION = Path(__file__).resolve().parents[2] / "jobs/data/fashion_mnist_2000"


@pytest.fixture(scope="module")
def fidelity() -> Any:
    """The package torch-fidelity, with as much of torchvision as its front asks for."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed: pip install --no-deps torch-fidelity")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("", ".datasets", ".transforms", ".transforms.functional"):
            module = ModuleType(f"torchvision{name}")
            vars(module).update(dict.fromkeys(("CIFAR10", "CIFAR100", "STL10"), object))
            patch.setitem(sys.modules, module.__name__, module)
        package = importlib.import_module("torch_fidelity")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
            del sys.modules[name]  # so that jebm finds its own way to the net
    return package


@pytest.fixture(scope="module")
def weights(fidelity: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state dict of random weights with which features differ from image to image."""
    empty = tmp_path_factory.mktemp("weights") / "empty.pth"
    torch.save({}, empty)

    class Unloaded(fidelity.FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: object) -> None:
            pass

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Unloaded("random", ["2048"], str(empty))
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0, 0.1)
                nn.init.uniform_(module.running_var, 0.8, 1.2)
                nn.init.normal_(module.bias, 0, 0.1)
    path = empty.with_name("random.pth")
    torch.save(net.state_dict(), path)
    yield path
    path.unlink()  # 95 MB


@pytest.fixture(scope="module")
def pixels(fashion: ImageSet) -> dict[str, Tensor]:
    """Grey images of 28 x 28 and colour images of 32 x 32, (N, C, H, W), uint8."""
    grey = torch.from_numpy(fashion.images_NHWC[:5].copy()).permute(0, 3, 1, 2)
    random = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (5, 3, 8, 8), generator=random, dtype=torch.uint8)
    return {"grey": grey, "colour": coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)}


@pytest.fixture(scope="module")
def published(fidelity: Any, weights: Path, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Features (N, F) of these images by the package itself."""
    net = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
    with torch.no_grad():
        return {name: net(images.expand(-1, 3, -1, -1))[0] for name, images in pixels.items()}


@pytest.fixture(scope="module")
def found(weights: Path, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by ours, of images in [-1, 1]."""
    net = inception_features(weights)
    return {name: net(images / 127.5 - 1) for name, images in pixels.items()}


# --- the figures


@pytest.mark.parametrize("kind", ["grey", "colour"])
def test_features_are_the_packages(kind: str, found: dict[str, Tensor], published: dict[str, Tensor]) -> None:
    assert found[kind].shape == (5, InceptionFeatures.dimension)
    assert found[kind].dtype == torch.float32
    scale = float(published[kind].std(0).mean())
    torch.testing.assert_close(found[kind], published[kind], atol=1e-5 * scale, rtol=1e-5)


def test_the_frechet_distance_is_the_packages(
    fidelity: Any, found: dict[str, Tensor], published: dict[str, Tensor]
) -> None:
    """Of every eighth feature: the package's eigenvalues of all would take half a minute."""
    ours_NF, theirs_NF = (torch.cat([kinds["grey"], kinds["colour"]])[:, ::8] for kinds in (found, published))
    fid = fidelity.metric_fid
    statistics = [fid.fid_features_to_statistics(theirs_NF[part::2]) for part in (0, 1)]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID]
    moments = [Moments.of(ours_NF[part::2]) for part in (0, 1)]
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-4)
    means = float((moments[0].mean() - moments[1].mean()).square().sum())
    assert expected > 1.5 * means  # covariances count as well


# --- the file


def test_the_file_makes_the_net(weights: Path, fashion: ImageSet) -> None:
    """Making the net draws no random numbers of torch's, and does not import all of the package."""
    state = torch.get_rng_state()
    evaluation = Evaluation(features=Features(kind="inceptionv3"), inception_weights=str(weights))
    net = feature_net(Config(evaluation=evaluation), fashion)
    assert torch.equal(torch.get_rng_state(), state)
    assert "torch_fidelity" not in sys.modules
    assert net.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert not is_fid(net)


def test_only_the_known_weights_make_an_fid() -> None:
    assert is_fid(InceptionFeatures(nn.Identity(), "6726825d" + 56 * "0", "cpu"))
    assert not is_fid(InceptionFeatures(nn.Identity(), "6726825e" + 56 * "0", "cpu"))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "does not hold plain tensors"),
        (b"<html>not found</html>", "does not hold plain tensors"),
        (b"cos\nsystem\n(S'touch {folder}/run'\ntR.", "does not hold plain tensors"),
        ([torch.zeros(2)], r"does not hold the weights of InceptionV3 \(.*list"),
        (
            {"fc.bias": torch.zeros(1008)},
            r"does not hold the weights of InceptionV3 \(Missing key.*Conv2d_1a",
        ),
        ({"fc.bias": 3}, r"does not hold the weights of InceptionV3 \("),
    ],
    ids=["empty", "text", "code", "list", "other keys", "a number"],
)
@pytest.mark.usefixtures("fidelity")
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: object, line: str) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content.replace(b"{folder}", str(tmp_path).encode()))
    else:
        torch.save(content, path)
    with pytest.raises(ConfigError, match=f"^evaluation.inception_weights: .*weights.pth {line}") as raised:
        inception_features(path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_weights_of_other_shapes_are_refused(weights: Path, tmp_path: Path) -> None:
    tensors = torch.load(weights, weights_only=True)
    tensors["fc.weight"] = tensors["fc.weight"][:1000].clone()
    path = tmp_path / "torchvision.pth"
    torch.save(tensors, path)
    try:
        with pytest.raises(ConfigError, match=r"does not hold the weights of InceptionV3 .*fc\.weight"):
            inception_features(path)
    finally:
        path.unlink()  # 95 MB


@pytest.mark.usefixtures("fidelity")
def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(ConfigError, match=f"^evaluation.inception_weights: {path} cannot be read"):
            inception_features(path)
    nowhere = str(tmp_path / "nowhere.pth")
    evaluation = Evaluation(100, features=Features(kind="inceptionv3"), inception_weights=nowhere)
    config = Config(data=Data(str(FASHION / "train")), train=Train(batch_size=100), evaluation=evaluation)
    manifest = read_manifest(open_store(config.data.train))
    with pytest.raises(ConfigError, match=r"^evaluation\.inception_weights: .*nowhere\.pth cannot be read"):
        check_quick_look(config, manifest, manifest, None)  # before a run begins, not at its first look


def test_without_the_package_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for name in [name for name in sys.modules if name.startswith("torch_fidelity.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        ConfigError, match=r"inceptionv3 needs a package; pip install --no-deps torch-fidelity"
    ):
        inception_features(tmp_path)
