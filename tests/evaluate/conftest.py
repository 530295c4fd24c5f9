"""What the tests of the measures share: one thread, and the 2,000 real images of the repository."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jebm.data.dataset import ImageSet, load_images
from jebm.evaluate.features.classifier import ClassifierFeatures, classifier_features
from jebm.store.storage import open_store

FASHION = Path(__file__).resolve().parents[2] / "jobs/data/fashion_mnist_2000"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def fashion(cache: Path) -> ImageSet:
    """2,000 training images of Fashion-MNIST."""
    return load_images(open_store(str(FASHION / "train")), cache)


@pytest.fixture(scope="session")
def fashion_test(cache: Path) -> ImageSet:
    """Held-out images of Fashion-MNIST."""
    return load_images(open_store(str(FASHION / "test")), cache)


@pytest.fixture(scope="session")
def fashion_classifier(fashion: ImageSet, cache: Path) -> ClassifierFeatures:
    """The classifier of the 2,000 images."""
    return classifier_features(fashion, cache_directory=cache)
