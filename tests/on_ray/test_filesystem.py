"""The filesystem that Ray Train gets: what Ray does with it, on a folder of this machine."""

import pickle
from pathlib import Path

import pytest
from pyarrow.fs import FileSelector, FileType
from ray.train.v2._internal.execution.storage import delete_fs_path

from jebm.on_ray.filesystem import ray_filesystem
from jebm.store.storage import open_store

CHECKPOINT = "run/checkpoints/step-00000021-a0001"


def test_ray_may_forget_a_checkpoint_that_was_pruned_already(tmp_path: Path) -> None:
    """Its controller polls the workers' reports; a busy one comes after the retention, and must live."""
    delete_fs_path(ray_filesystem(str(tmp_path)), CHECKPOINT)


def test_ray_deletes_no_checkpoint(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put(f"{CHECKPOINT}/MANIFEST.json", b"{}")
    delete_fs_path(ray_filesystem(str(tmp_path)), CHECKPOINT)
    assert store.get(f"{CHECKPOINT}/MANIFEST.json") == b"{}"


def test_its_own_files_are_objects_of_the_store(tmp_path: Path) -> None:
    filesystem, store = ray_filesystem(str(tmp_path)), open_store(str(tmp_path))
    with filesystem.open_output_stream("run/checkpoints/snapshot.json") as stream:
        stream.write(b"list")
        assert store.head("run/checkpoints/snapshot.json") is None  # whole or not at all
    assert store.get("run/checkpoints/snapshot.json") == b"list"
    with pickle.loads(pickle.dumps(filesystem)).open_input_stream("run/checkpoints/snapshot.json") as stream:
        assert stream.read() == b"list"
    listed = filesystem.get_file_info(FileSelector("run", recursive=False))
    assert [(found.path, found.type) for found in listed] == [("run/checkpoints", FileType.Directory)]
    filesystem.delete_file("run/checkpoints/snapshot.json")
    assert filesystem.get_file_info("run/checkpoints/snapshot.json").type == FileType.NotFound
    with pytest.raises(FileNotFoundError):
        filesystem.open_input_stream("run/checkpoints/snapshot.json")
