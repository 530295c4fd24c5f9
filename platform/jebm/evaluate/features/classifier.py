"""A small classifier trained on labelled images; its hidden layer is a feature net for data of its classes.

Shapes: N images of a set, B batch, C channels, H height, W width, F features, K classes.
"""

import hashlib
import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jebm.data.dataset import ImageSet, default_cache_directory
from jebm.data.loader import to_float
from jebm.errors import CheckpointError, ConfigError, DataError, StoreError
from jebm.rng import generator
from jebm.store.layout import StoredObject
from jebm.store.records import DamagedRecordError, read_object, set_aside
from jebm.store.storage import ObjectExistsError, ObjectMissingError, Store, open_store
from jebm.store.stream import restore_tensors, upload_tensors

__all__ = ["ClassifierFeatures", "check_classes", "classifier_features", "digest_of"]

_LOG = logging.getLogger("jebm.evaluate")
_Indices: TypeAlias = npt.NDArray[np.int64]

_RECIPE = 1
"""Version of the classifier's layers and training: increment it with any change, so no old one is used."""

_FEATURES = 64
_BATCH = 128
_MOST_UPDATES = 1_500
_MOST_EPOCHS = 20
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 0.05
_SMALLEST_PLANE = 8
_SCALED_BY = 10_000
"""Training images whose features are given mean 0 and variance 1."""


class _Classifier(nn.Module):
    """Convolutions that halve the plane down to at most 8 x 8, `_FEATURES` linear features, linear logits."""

    mean_F: Tensor
    std_F: Tensor

    def __init__(self, channels: int, height: int, width: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels_in, channels_out = channels, 32
        while not layers or max(height, width) > _SMALLEST_PLANE:
            layers += [
                nn.Conv2d(channels_in, channels_out, 3, 2, 1, bias=False),
                nn.BatchNorm2d(channels_out),
                nn.ReLU(),
            ]
            channels_in, channels_out = channels_out, 64
            height, width = (height + 1) // 2, (width + 1) // 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels_in * height * width, _FEATURES))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(_FEATURES, classes))
        self.register_buffer("mean_F", torch.zeros(_FEATURES))
        self.register_buffer("std_F", torch.ones(_FEATURES))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return logits, (B, K)."""
        logits_BK: Tensor = self.head(self.body(x_BCHW))
        return logits_BK


class ClassifierFeatures:
    """The last hidden layer of a trained classifier, before its ReLU.

    Each feature is scaled to mean 0 and variance 1 on training images.
    """

    name = "classifier"
    dimension = _FEATURES

    def __init__(self, net: _Classifier, classes: tuple[int, ...], device: torch.device | str) -> None:
        """Take a trained net, the label of each of its logits, and the device."""
        self.classes = classes
        self.sha256 = digest_of(net.state_dict())
        self._net = net.to(device).eval().requires_grad_(requires_grad=False)

    def on(self, device: torch.device | str) -> "ClassifierFeatures":
        """Return the same features, computed on a device."""
        return ClassifierFeatures(self._net, self.classes, device)

    @torch.no_grad()
    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Return features (B, 64)."""
        h_BF: Tensor = self._net.body(x_BCHW.to(self._net.mean_F))
        return (h_BF - self._net.mean_F) / self._net.std_F

    @torch.no_grad()
    def predict(self, x_BCHW: Tensor) -> Tensor:
        """Return the likeliest label of each image in [-1, 1], (B,), int64."""
        logits_BK = self._net(x_BCHW.to(self._net.mean_F))
        return torch.tensor(self.classes, device=logits_BK.device)[logits_BK.argmax(1)]


def classifier_features(
    train: ImageSet,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    cache_directory: Path | None = None,
) -> ClassifierFeatures:
    """Return the features of a small classifier trained on the labelled images of a set.

    The result depends only on images, labels, `seed` and the kind of processor, not on the device: it is
    trained on the CPU, in one thread (a minute for 28 x 28 pixels), and kept under `<cache>/classifiers` (see
    `default_cache_directory`) for all processes of the node. If several start at once, each trains, one
    result wins, and all use it.

    Raises ConfigError for images without labels or of one class, DataError if the cache cannot be written.
    """
    chosen_N, labels_N = _labelled(train)
    classes_K = check_classes(train)
    targets_N = np.searchsorted(classes_K, labels_N)
    manifest = train.manifest
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, 0, 0, "classifier weights").initial_seed())
        net = _Classifier(manifest.channels, manifest.height, manifest.width, len(classes_K))
    identity = {
        "format": "jebm-classifier",
        "recipe": _RECIPE,
        "images": manifest.sha256,
        "labels": manifest.labels_sha256,
        "seed": seed,
    }
    directory = (cache_directory or default_cache_directory()) / "classifiers"
    store = open_store(str(directory))
    try:
        if not _restored(store, identity, net):
            _LOG.info("training the classifier of evaluation.features on %s", _described(train))
            _train(net, train, chosen_N, targets_N, seed)
            _keep(store, identity, net)
            # If several processes trained at once, all continue with the same result.
            _restored(store, identity, net)
    except StoreError as error:
        raise DataError(
            f"{directory}: the classifier cannot be kept here ({error}); set JEBM_CACHE to a folder that can"
            " be written"
        ) from error
    return ClassifierFeatures(net, tuple(classes_K.tolist()), device)


def _described(images: ImageSet) -> str:
    return f"{images.manifest.name} ({images.manifest.split})"


def _labelled(images: ImageSet) -> tuple[_Indices, _Indices]:
    """Return which images have a label, at least one, and their labels."""
    if images.labels_N is None or (images.labels_N < 0).all():
        raise ConfigError(
            f"evaluation.features: {_described(images)} has no labels for a classifier; use effnetlite0"
        )
    chosen_N = np.flatnonzero(images.labels_N >= 0)
    return chosen_N, images.labels_N[chosen_N].astype(np.int64)


def check_classes(images: ImageSet) -> _Indices:
    """Return the distinct labels in order; ConfigError for fewer than two."""
    classes_K = np.unique(_labelled(images)[1])
    if len(classes_K) < 2:
        raise ConfigError(f"evaluation.features: {_described(images)} has only one class; use effnetlite0")
    return classes_K


@torch.enable_grad()
def _train(net: _Classifier, images: ImageSet, chosen_N: _Indices, targets_N: _Indices, seed: int) -> None:
    """Train the net by cross-entropy, with AdamW and a cosine schedule to zero; then scale its features."""
    count, batch = len(chosen_N), min(_BATCH, len(chosen_N))
    per_epoch = count // batch
    updates = min(_MOST_UPDATES, _MOST_EPOCHS * per_epoch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    order_N = torch.empty(0, dtype=torch.int64)
    with _one_thread():
        for update in range(updates):
            epoch, position = divmod(update, per_epoch)
            if position == 0:
                stream = generator(seed, 0, epoch, "classifier order")
                order_N = torch.randperm(count, generator=stream)
            order_B = order_N[position * batch : (position + 1) * batch].numpy()
            logits_BK = net(to_float(images.images_NHWC[chosen_N[order_B]], "cpu"))
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(logits_BK, torch.from_numpy(targets_N[order_B])))
            optimizer.step()
            schedule.step()
        _scale(net.eval(), images, chosen_N[:: -(-count // _SCALED_BY)])


@torch.no_grad()
def _scale(net: _Classifier, images: ImageSet, chosen_N: _Indices) -> None:
    """Set mean and standard deviation of the features to those of the chosen images."""
    parts = np.array_split(chosen_N, -(-len(chosen_N) // 500))
    h_NF = torch.cat([net.body(to_float(images.images_NHWC[part], "cpu")) for part in parts]).double()
    net.mean_F.copy_(h_NF.mean(0))
    net.std_F.copy_(h_NF.std(0, correction=0).clamp(min=1e-6))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Restrict torch to one thread inside: several would sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _record_key(identity: Mapping[str, object]) -> str:
    return f"classifier-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}.json"


def _keep(store: Store, identity: Mapping[str, object], net: _Classifier) -> None:
    """Write the net's tensors, then the record that publishes them, unless another process has."""
    record_key = _record_key(identity)
    # A unique name, so that no file that another process may be reading is replaced.
    name = f"{record_key.removesuffix('.json')}-{uuid.uuid4().hex[:8]}.safetensors"
    tensors = asdict(upload_tensors(store, name, net.state_dict()))
    try:
        record = json.dumps({**identity, "tensors": tensors}, indent=1)
        store.put(record_key, record.encode(), if_absent=True)
    except ObjectExistsError:
        store.delete([name])


def _restored(store: Store, identity: Mapping[str, object], net: _Classifier) -> bool:
    """Load the stored tensors into the net and return whether there were any; damaged ones do not count."""
    record_key = _record_key(identity)
    if store.head(record_key) is None:
        return False
    tensors = {name: torch.empty_like(tensor) for name, tensor in net.state_dict().items()}
    try:
        record = read_object(store, record_key)
        stored = StoredObject(**record.pop("tensors"))
        if record != identity:
            raise ValueError(f"{record_key} is of another classifier")
        restore_tensors(store, [stored], tensors)
    except (
        *(CheckpointError, DamagedRecordError, ObjectMissingError),
        *(AttributeError, KeyError, TypeError, ValueError),
    ) as error:
        kept = set_aside(store, record_key)
        _LOG.warning(
            "%s/%s: damaged (%s); it is kept as %s, and the classifier is trained again",
            *(store.uri, record_key, error, kept),
        )
        return False
    net.load_state_dict(tensors)
    net.eval()
    return True


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hex, of named tensors: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
