"""From a run to the folder of its model."""

from collections.abc import Collection

from jebm.evaluate.restore import restored
from jebm.pretrained.card import card
from jebm.pretrained.folder import Description, write_folder
from jebm.pretrained.model import origin_of_run
from jebm.store.retrieve import open_run
from jebm.store.storage import Store

__all__ = ["export"]


def export(uri: str, output: Store, trusted: Collection[str] = ()) -> Description:
    """Write the model of a run (its newest checkpoint), or of …/checkpoints/<name>, with its card.

    Raises as `restored`; StoreError if the output cannot be written.
    """
    found = restored(uri, trusted=trusted)
    run = open_run(found.run)
    origin, provenance = origin_of_run(found), dict(sorted(found.manifest.provenance.items()))
    beside = card(found, origin, provenance, run.root.child(run.name))
    return write_folder(output, found.model.state_dict(), found.config, (origin, provenance), beside)
