"""Whether a sweep's objective is taken on images that no final figure is measured on."""

from jebm.config import Config
from jebm.data.dataset import load_images, shared_images
from jebm.data.manifest import DatasetManifest
from jebm.data.splits import canonical
from jebm.errors import ConfigError
from jebm.store.storage import open_store
from jebm.sweep.space import Search

__all__ = ["check_honest"]

_MOST_SHARED = 0.01
"""Share of the validation images that may be in the test set too: real data have a few doubles."""

_REMEDY = "jebm ingest SOURCE --validation N holds images back from the training set"


def check_honest(search: Search, config: Config, validation: DatasetManifest) -> None:
    """Refuse a sweep that would choose by the images which final figures are measured on.

    Reads the validation and the test images, to compare their pixels. An objective of training itself, such
    as distortion, sees neither.

    Raises:
        ConfigError: an objective is an evaluation, and there is no `data.validation`, it is a test split, or
            more than 1 % of its images are in `data.held_out`.
        DataError, StoreError: the images cannot be read.
    """
    judged = [each.metric for each in search.objectives if each.metric.startswith("evaluation/")]
    if not judged:
        return
    if config.data.validation is None:
        raise ConfigError(f"data.validation: is missing, and {judged[0]} may not see test images; {_REMEDY}")
    if canonical(validation.split) == "test":
        raise ConfigError(
            f"data.validation: {config.data.validation} is split {validation.split} of {validation.name}, "
            f"and {judged[0]} may not see test images; {_REMEDY}"
        )
    if config.data.held_out is None:
        return
    ours, test = (load_images(open_store(uri)) for uri in (config.data.validation, config.data.held_out))
    shared = shared_images(ours, test)
    if shared > _MOST_SHARED * validation.images:
        raise ConfigError(
            f"data.validation: {shared:,} of its {validation.images:,} images are in data.held_out too, and "
            f"{judged[0]} may not see test images; {_REMEDY}"
        )
