"""What every store does, whatever it keeps its objects in."""

import os
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from pyarrow.fs import FileSystem

from jebm.errors import StoreError
from jebm.store.storage import (
    ObjectChangedError,
    ObjectExistsError,
    ObjectMissingError,
    Probe,
    arrow_uri,
    open_store,
)

MIB = 1 << 20


def test_returns_what_was_put(store):
    info = store.put("a/b.bin", b"hello")
    assert (info.key, info.size) == ("a/b.bin", 5)
    assert abs(datetime.now(UTC) - info.modified) < timedelta(minutes=5)
    assert store.get("a/b.bin") == b"hello"
    assert store.head("a/b.bin") == info
    assert store.put("a/b.bin", memoryview(b"other")).etag != info.etag
    assert store.get("a/b.bin") == b"other"
    assert store.put("empty", b"").size == 0
    assert store.get("empty") == b""


def test_says_that_an_object_is_missing(store):
    assert store.head("nothing") is None
    with pytest.raises(ObjectMissingError, match="nothing: no such object"):
        store.get("nothing")
    with pytest.raises(ObjectMissingError):
        store.read_into("nothing", 0, [memoryview(bytearray(1))])


def test_lists_by_prefix(store):
    keys = ["b", "a/z", "a/b/c", "a.x", "a/b.c", "aé"]
    for key in keys:
        store.put(key, key.encode())
    everything = {info.key: info for info in store.list()}
    assert sorted(everything) == sorted(keys)
    assert everything["a.x"] == store.head("a.x")
    assert {info.key for info in store.list("a/b")} == {"a/b.c", "a/b/c"}
    assert [info.key for info in store.list("a/b/")] == ["a/b/c"]
    assert list(store.list("none")) == []


def test_folders_are_what_holds_objects(store):
    for key in ["x/1/a", "x/1/b", "x/2/deep/a", "x/file", "y"]:
        store.put(key, b"")
    assert list(store.folders()) == ["x"]
    assert list(store.child("x").folders()) == ["1", "2"]
    assert list(store.child("x/1").folders()) == list(store.child("none").folders()) == []


def test_deleting_what_is_not_there_is_fine(store):
    store.put("a", b"")
    store.delete(["a", "b/c"])
    store.delete([])
    assert list(store.list()) == []


def test_a_child_is_a_folder(store):
    child = store.child("runs/one/")
    assert child.uri == f"{store.uri}/runs/one"
    child.put("a", b"1")
    assert store.get("runs/one/a") == b"1"
    store.put("runs/one-more/b", b"")
    assert [info.key for info in child.list()] == ["a"]
    assert open_store(store.uri).get("runs/one/a") == b"1"


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "./a", "a\\b", "a\nb", "a" * 1025])
def test_refuses_keys_that_mean_different_things_in_different_places(store, key):
    for use in (store.get, store.head, lambda key: store.put(key, b""), lambda key: store.delete([key])):
        with pytest.raises(StoreError, match="is not a key"):
            use(key)


def test_fills_pieces_from_a_range(store):
    data = os.urandom(3 * MIB)
    info = store.put("a", data)
    into = bytearray(2 * MIB + 7)
    view = memoryview(into)
    store.read_into("a", 11, [view[:5], view[5:5], view[5:MIB], view[MIB:]], etag=info.etag)
    assert into == data[11 : 11 + len(into)]
    store.read_into("a", 3 * MIB, [])


def test_a_range_is_of_the_object_asked_for(store):
    etag = store.put("a", b"0123456789").etag
    for offset, size in ((5, 6), (10, 1), (100, 1)):
        with pytest.raises(ObjectChangedError, match="ends before"):
            store.read_into("a", offset, [memoryview(bytearray(size))])
    store.put("a", b"9876543210")
    with pytest.raises(ObjectChangedError, match="replaced"):
        store.read_into("a", 0, [memoryview(bytearray(1))], etag=etag)


def test_uploads_parts_made_of_pieces(store):
    data = memoryview(os.urandom(17 * MIB))
    parts = [
        [data[:3], data[3 : 2 * MIB], data[2 * MIB : 8 * MIB]],
        [data[8 * MIB : 16 * MIB]],
        [data[16 * MIB :]],
    ]
    uploaded = store.upload("big", parts)
    assert store.get("big") == data
    assert uploaded.info == store.head("big")
    assert uploaded.crc32 == tuple(zlib.crc32(b"".join(part)) for part in parts)
    assert store.upload("small", [[data[:5]]]).crc32 == (zlib.crc32(data[:5]),)
    assert store.get("small") == data[:5]


def test_sixteen_conditional_puts_have_one_winner(store):
    barrier = threading.Barrier(16)

    def put(number):
        barrier.wait()
        try:
            store.put("marker", b"%d" % number, if_absent=True)
        except ObjectExistsError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(put, range(16)))
    assert sum(won) == 1
    assert store.get("marker") == b"%d" % won.index(True)


def test_lists_and_deletes_more_than_a_page(store, monkeypatch):
    monkeypatch.setattr("jebm.store.s3_listing._PAGE", 10)
    monkeypatch.setattr("jebm.store.s3._DELETE_BATCH", 10)
    keys = [f"many/{number:05d}" for number in range(33)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: store.put(key, b"x"), keys))
    store.put("other", b"")
    assert [info.key for info in store.list("many/")] == keys
    store.delete(keys)
    assert [info.key for info in store.list()] == ["other"]


def test_a_probe_leaves_nothing_behind(store):
    store.put("a", b"1")
    assert store.probe() == Probe(writable=True, conditional_writes=True)
    assert store.probe(write=False) == Probe(writable=False, conditional_writes=False)
    assert [info.key for info in store.list()] == ["a"]


def test_a_probe_of_a_folder_that_is_not_there_makes_none(tmp_path):
    assert open_store(str(tmp_path / "a" / "b")).probe().writable
    assert list(tmp_path.iterdir()) == []


def test_local_objects_stay_inside(tmp_path):
    (tmp_path / "outside").mkdir()
    store = open_store(str(tmp_path / "store"))
    store.put("a", b"")
    (tmp_path / "store" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match="out of the store"):
        store.put("link/a", b"")
    with pytest.raises(StoreError, match="outside"):
        list(store.list("../"))


def test_local_store_with_a_space_in_its_path(tmp_path):
    store = open_store(str(tmp_path / "a b"))
    store.put("a", b"1")
    assert open_store(store.uri).get("a") == b"1"
    assert arrow_uri(store.uri) == store.uri


def test_local_store_names_what_the_system_refuses(tmp_path):
    store = open_store(str(tmp_path))
    store.put("file", b"")
    with pytest.raises(StoreError, match=r"file/below: .*(is no folder|Not a directory)"):
        store.put("file/below", b"")
    with pytest.raises(StoreError, match=r"/file: is a file; give the folder"):
        open_store(str(tmp_path / "file")).probe(write=False)
    with pytest.raises(StoreError, match="no such folder"):
        open_store(str(tmp_path / "absent")).probe(write=False)


def test_arrow_writes_where_we_read(store):
    if store.uri.startswith("memory://"):
        with pytest.raises(StoreError, match="other processes"):
            arrow_uri(store.uri)
        return
    store.put("a", b"1")
    filesystem, path = FileSystem.from_uri(arrow_uri(store.uri))
    with filesystem.open_output_stream(f"{path}/b") as stream:
        stream.write(b"2")
    assert store.get("b") == b"2"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("/proc/none", "cannot be written: No such file or directory: "),
        ("{file}/below", "cannot be written: "),
        ("{file}", "cannot be written: "),
        ("{long}", "File name too long"),
    ],
)
def test_a_folder_that_cannot_be_written_is_said_to_be_so(tmp_path, place, reason):
    (tmp_path / "file").write_text("in the way")
    uri = place.format(file=tmp_path / "file", long=tmp_path / ("n" * 300))
    for use in (lambda: open_store(uri).probe(), lambda: open_store(uri).put("a/b", b"1")):
        with pytest.raises(StoreError) as caught:
            use()
        assert reason in str(caught.value)
        assert str(caught.value).endswith("; choose another folder")
        assert "\n" not in str(caught.value)
        assert not isinstance(caught.value, ObjectMissingError | ObjectExistsError)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_folder_in_place_of_an_object_is_no_object(tmp_path):
    store = open_store(str(tmp_path))
    store.put("a/b", b"1")
    for use in (lambda: store.put("a", b"2"), lambda: store.put("a", b"2", if_absent=True)):
        with pytest.raises(StoreError):
            use()
    assert store.head("a") is None
    with pytest.raises(ObjectMissingError):
        store.get("a")
    assert [info.key for info in store.list()] == ["a/b"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
