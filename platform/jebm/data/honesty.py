"""Whether what is chosen by an evaluation is chosen on images that no final figure is measured on."""

from jebm.config import Config
from jebm.data.dataset import load_images, shared_images
from jebm.data.manifest import DatasetManifest
from jebm.data.splits import canonical
from jebm.errors import ConfigError
from jebm.store.storage import open_store

__all__ = ["check_honest"]

_MOST_SHARED = 0.01
"""Share of the validation images that may be in the test set too: real data have a few doubles."""

_REMEDY = "jebm ingest SOURCE --validation N holds images back from the training set"


def check_honest(metric: str, config: Config, validation: DatasetManifest) -> None:
    """Refuse a metric to choose by, if it would be measured on the images that final figures are for.

    Reads the validation and the test images, to compare their pixels. A metric of training itself, such as
    distortion, sees neither.

    Raises:
        ConfigError: the metric is an evaluation, and there is no `data.validation`, it is a test split, or
            more than 1 % of its images are in `data.held_out`.
        DataError, StoreError: the images cannot be read.
    """
    if not metric.startswith("evaluation/"):
        return
    place, test_place = config.data.validation, config.data.held_out
    if not place:
        raise ConfigError(f"data.validation: is missing, and {metric} may not see test images; {_REMEDY}")
    if canonical(validation.split) == "test":
        raise ConfigError(
            f"data.validation: {place} is split {validation.split} of {validation.name}, "
            f"and {metric} may not see test images; {_REMEDY}"
        )
    if not test_place:
        return
    shared = shared_images(load_images(open_store(place)), load_images(open_store(test_place)))
    if shared > _MOST_SHARED * validation.images:
        raise ConfigError(
            f"data.validation: {shared:,} of its {validation.images:,} images are in data.held_out too, and "
            f"{metric} may not see test images; {_REMEDY}"
        )
