"""`verify --deep`, `latest(deep=True)`, `load` and download: one judge, whatever a bucket holds."""

import json
import math
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jebm.errors import CheckpointError
from jebm.store.checkpoint import Checkpoints, Facts, Manifest
from jebm.store.finite import FiniteScan
from jebm.store.layout import StoredObject, TensorEntry
from jebm.store.mirror import download
from jebm.store.parts import damages
from jebm.store.retrieve import RunStore, read_tensors, tensor_table, verify_checkpoint
from jebm.store.storage import Store, open_store

FACTS = Facts(step=0, attempt=1, state={}, config={}, metrics={}, provenance={}, world_size=1, parent=None)
STATE = {"model.w": torch.arange(6.0), "model.v": torch.arange(6.0) + 10}


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(
    begin: int, shape: list[int] | None = None, dtype: str = "F32", size: int = 24
) -> dict[str, object]:
    return {"dtype": dtype, "shape": [6] if shape is None else shape, "data_offsets": [begin, begin + size]}


DATA = b"".join(tensor.numpy().tobytes() for tensor in STATE.values())
GOOD = {"model.w": entry(0), "model.v": entry(24)}
TWICE = json.dumps({"__metadata__": {}})[:-1] + "," + json.dumps({"__metadata__": {}} | GOOD)[1:]
LAYOUTS: dict[str, list[bytes]] = {
    "overlap": [file_of({"model.w": entry(0), "model.v": entry(0)}, DATA[:24])],
    "a gap": [file_of({"model.w": entry(0), "model.v": entry(32)}, DATA[:24] + bytes(8) + DATA[24:])],
    "more than the tensors": [file_of(GOOD, DATA + b"more")],
    "a huge shape": [file_of({"model.w": entry(0), "model.v": entry(24, [1 << 62, 1 << 62])}, DATA)],
    "a huge empty shape": [file_of(GOOD | {"model.x": entry(48, [1 << 62, 1 << 62, 0], size=0)}, DATA)],
    "very many dimensions": [file_of(GOOD | {"model.x": entry(48, [1 << 62] * 9999 + [0], size=0)}, DATA)],
    "deep": [file_of(b'{"a":' * 5000 + b"1" + b"}" * 5000, DATA)],
    "deeper": [file_of(b"[" * 200_000, DATA)],
    "metadata twice": [file_of(TWICE.encode(), DATA)],
    "a tensor twice": [file_of(json.dumps(GOOD)[:-1].encode() + b"," + json.dumps(GOOD)[1:].encode(), DATA)],
    "a tensor in two objects": [file_of(GOOD, DATA), file_of({"model.w": entry(0)}, DATA[:24])],
    "no JSON": [file_of(b"\x80\x04\x95", DATA)],
    "not UTF-8": [file_of(b'{"\xff":1}', DATA)],
    "a header beyond the object": [(1 << 40).to_bytes(8, "little") + b"{}"],
    "not even a length": [b"1234567"],
    "an unknown dtype": [file_of({"model.w": entry(0), "model.v": entry(24, dtype="OBJECT")}, DATA)],
}


@pytest.fixture
def run() -> RunStore:
    store = open_store(f"memory://{uuid.uuid4().hex}")
    return RunStore(store, "run", Checkpoints(store, "run"))


def save(run: RunStore, step: int, state: Mapping[str, torch.Tensor] = STATE) -> Manifest:
    return run.checkpoints.save(state, replace(FACTS, step=step))


def plant(run: RunStore, step: int, files: list[bytes], *, hashed: bool = True) -> Manifest:
    """Write a checkpoint of such files, under a manifest that vouches for every byte of them."""
    manifest = save(run, step)
    folder = run.folder(manifest.name)
    objects = []
    for rank, data in enumerate(files):
        key = f"data/r{rank:05d}-00000000.safetensors"
        info = folder.put(key, data)
        length = 8 + int.from_bytes(data[:8], "little")
        header = zlib.crc32(data[:length]) if hashed else None
        objects.append(StoredObject(key, len(data), info.etag, 1 << 24, (zlib.crc32(data),), header))
    forged = replace(manifest, objects=tuple(objects))
    folder.put("MANIFEST.json", forged.encode())
    return forged


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        work()
    return str(caught.value)


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("what", LAYOUTS)
def test_what_load_refuses_verify_names_and_a_resume_passes_over(
    run: RunStore, what: str, hashed: bool
) -> None:
    whole = save(run, 1)
    forged = plant(run, 2, LAYOUTS[what], hashed=hashed)
    folder = run.folder(forged.name)
    assert run.checkpoints.latest() == forged  # without a look at the data there is nothing odd
    (problem,) = damages(folder, forged.objects)
    into = {name: torch.full_like(tensor, 7) for name, tensor in STATE.items()}
    assert refused(lambda: run.checkpoints.load(forged, into)) == problem
    assert all(bool((tensor == 7).all()) for tensor in into.values())
    assert refused(lambda: tensor_table(folder, forged)) == problem
    assert refused(lambda: read_tensors(run, forged, STATE)) == problem
    assert run.checkpoints.latest(deep=True) == whole


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named_by_all(run: RunStore, tmp_path: Path, value: float) -> None:
    whole = save(run, 1)
    spoiled = {**STATE, "model.v": torch.tensor([1.0, value]), "model.u": torch.arange(2)}
    manifest = save(run, 2, spoiled)
    folder = run.folder(manifest.name)
    assert verify_checkpoint(folder, manifest, lambda *_: None) == ["model.v holds NaN or infinity"]
    into = {name: torch.zeros_like(tensor) for name, tensor in spoiled.items()}
    assert "model.v holds NaN or infinity" in refused(lambda: run.checkpoints.load(manifest, into))
    assert "model.v holds NaN or infinity" in refused(lambda: read_tensors(run, manifest, ["model.v"]))
    assert read_tensors(run, manifest, ["model.w"])["model.w"].equal(STATE["model.w"])
    assert run.checkpoints.latest(deep=True) == whole
    # The bytes themselves can be had: somebody may want to look at them.
    done = download(run, manifest, tmp_path, lambda *_: None)
    assert verify_checkpoint(open_store(str(done.folder)), manifest, lambda *_: None) != []


def test_many_such_tensors_make_one_line(run: RunStore) -> None:
    manifest = save(run, 1, {f"t{number}": torch.tensor([math.nan]) for number in range(9)})
    assert damages(run.folder(manifest.name), manifest.objects) == [
        "t0, t1, t2 and 6 more hold NaN or infinity"
    ]


def test_a_copy_whose_etags_are_others_is_judged_by_all_that_it_holds(run: RunStore) -> None:
    whole = save(run, 1)
    forged = plant(run, 2, LAYOUTS["overlap"])
    objects = tuple(replace(stored, etag="another") for stored in forged.objects)
    run.folder(forged.name).put("MANIFEST.json", replace(forged, objects=objects).encode())
    assert run.checkpoints.latest() == whole


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("begin", [0, 3])  # the second one lies as no writer of ours lays it
def test_wherever_slices_cut_a_tensor_its_nan_is_found(dtype: torch.dtype, begin: int) -> None:
    values = torch.ones(9).to(dtype)
    size = dtype.itemsize
    clean = values.view(torch.uint8).numpy().tobytes()
    values[4] = math.nan
    spoiled = values.view(torch.uint8).numpy().tobytes()
    end = begin + 9 * size
    entries = {"a": TensorEntry(torch.uint8, (begin,), 0, begin), "b": TensorEntry(dtype, (9,), begin, end)}
    for data, found in ((spoiled, ["b"]), (clean, [])):
        whole = bytearray(b"\xff" * begin + data + b"\xff" * 20)
        for length in range(1, len(whole) + 1):
            scan = FiniteScan(entries)
            offsets = list(range(0, len(whole), length))
            for offset in [*offsets[::-1], offsets[0]]:  # in any order, and again
                scan.receive(offset, memoryview(whole)[offset : offset + length])
            assert scan.names() == found, length


def test_a_part_that_was_hurt_on_its_way_once_leaves_no_finding(run: RunStore) -> None:
    manifest = save(run, 1)

    class Hurting:
        """The folder, whose first answer of data has a NaN in it that is not there."""

        def __init__(self, folder: Store) -> None:
            self._folder, self.hurt = folder, 0

        def __getattr__(self, name: str) -> object:
            return getattr(self._folder, name)

        def read_into(self, key: str, offset: int, pieces: list[memoryview], **keywords: str) -> None:
            self._folder.read_into(key, offset, pieces, **keywords)
            whole = sum(piece.nbytes for piece in pieces) == manifest.objects[0].size
            if whole and "etag" in keywords and not self.hurt:
                pieces[0][-4:] = b"\xff\xff\xff\xff"
                self.hurt += 1

    folder = Hurting(run.folder(manifest.name))
    assert damages(folder, manifest.objects) == []  # type: ignore[arg-type]
    assert folder.hurt == 1
