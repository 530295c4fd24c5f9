import json
import os
import zlib

import pytest
import safetensors.torch
import torch

from jebm.errors import CheckpointError
from jebm.store import layout, parts
from jebm.store.layout import StoredObject
from jebm.store.parts import damages, read_headers
from jebm.store.storage import open_store
from jebm.store.stream import restore_tensors, upload_tensors

MIB = 1 << 20
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint64,
        torch.uint32,
        torch.uint16,
        torch.uint8,
    ),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
]


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits, NaNs with payloads among them."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer(bytearray(os.urandom(count)), dtype=torch.uint8).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    found = {f"of {dtype}": random_bits(dtype, 3, 5) for dtype in DTYPES}
    return found | {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "größe": torch.ones(2)}


def emptied(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def test_every_dtype_comes_back_bit_by_bit(store, tensors):
    stored = upload_tensors(store, "a", tensors)
    into = emptied(tensors)
    addresses = {name: tensor.data_ptr() for name, tensor in into.items()}
    restore_tensors(store, [stored], into)
    for name, tensor in tensors.items():
        assert bits(into[name]) == bits(tensor), name
        assert into[name].data_ptr() == addresses[name]


def test_the_safetensors_library_reads_it(store, tensors):
    upload_tensors(store, "a", tensors)
    read = safetensors.torch.load(store.get("a"))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert bits(read[name]) == bits(tensor)


def test_we_read_what_the_library_writes(tmp_path):
    tensors = {"b": torch.randn(7), "a": torch.arange(4), "c": torch.ones(2, 3, dtype=torch.bfloat16)}
    safetensors.torch.save_file(tensors, tmp_path / "a", metadata={"written by": "them"})
    (header,) = read_headers(open_store(str(tmp_path)), [stored_as_it_is(tmp_path / "a")])
    assert {name: (entry.dtype, entry.shape) for name, entry in header.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }


def test_parts_cut_through_tensors(store):
    # 37 MiB in 3 parts; no border of a tensor is one of a part.
    tensors = {f"{number:02d}": random_bits(torch.uint8, MIB + 1 + number) for number in range(37)}
    stored = upload_tensors(store, "a", tensors)
    assert (stored.part_size, len(stored.crc32)) == (16 * MIB, 3)
    into = emptied(tensors)
    restore_tensors(store, [stored], into)
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors.items())


def test_tensors_that_are_not_contiguous_are_copied(store):
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "transposed": base.transpose(0, 2),
        "strided": base[:, ::2],
        "conj": torch.view_as_complex(torch.randn(3, 2)).conj(),
        "expanded": torch.ones(1).expand(5),
    }
    stored = upload_tensors(store, "a", tensors)
    target = torch.zeros(2, 3, 4)
    into = {"transposed": target.transpose(0, 2), "strided": torch.zeros(2, 4, 4)[:, ::2]} | {
        name: torch.zeros(tensors[name].shape, dtype=tensors[name].dtype) for name in ("conj", "expanded")
    }
    restore_tensors(store, [stored], into)
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(target, base)


def test_parameters_of_a_model_are_restored_in_place(store):
    source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    stored = upload_tensors(store, "a", dict(source.named_parameters()))
    restore_tensors(store, [stored], dict(target.named_parameters()))
    assert torch.equal(source.weight, target.weight)
    assert target.weight.requires_grad


def test_every_flipped_bit_is_found(store):
    tensors = {"a": torch.randn(MIB), "b": torch.randn(5 * MIB)}  # 24 MiB, 2 parts
    stored = upload_tensors(store, "a", tensors)
    whole = store.get("a")
    for place in (len(whole) // 3, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        store.put("a", bytes(damaged))
        with pytest.raises(CheckpointError, match="does not match its CRC32"):
            restore_tensors(store, [stored], emptied(tensors))
        (only,) = damages(store, [stored])
        assert "does not match its CRC32" in only


def test_an_object_that_is_gone_or_short_is_named(store):
    tensors = {"a": torch.randn(5)}
    stored = upload_tensors(store, "a", tensors)
    store.put("a", store.get("a")[:-1])
    with pytest.raises(CheckpointError, match="bytes instead of"):
        restore_tensors(store, [stored], emptied(tensors))
    store.delete(["a"])
    with pytest.raises(CheckpointError, match="is gone"):
        restore_tensors(store, [stored], emptied(tensors))


def test_what_does_not_fit_is_listed_and_nothing_is_written():
    store = open_store("memory://fit")
    stored = upload_tensors(store, "a", {"same": torch.ones(2), "old": torch.ones(1), "w": torch.ones(2, 3)})
    into = {"same": torch.zeros(2), "new": torch.zeros(1), "w": torch.zeros(3, 2, dtype=torch.int32)}
    with pytest.raises(CheckpointError) as caught:
        restore_tensors(store, [stored], into)
    message = str(caught.value)
    assert "new is missing in the checkpoint" in message
    assert "old is only in the checkpoint" in message
    assert "w is torch.float32[2, 3] in the checkpoint and torch.int32[3, 2] in the model" in message
    assert torch.equal(into["same"], torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"; and 97 more"):
        restore_tensors(store, [stored], {f"{number}": torch.zeros(1) for number in range(97)})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3).to_sparse(),
        torch.ones(3, dtype=torch.complex128),
        torch.empty(3, device="meta"),
    ],
)
def test_what_has_no_place_in_the_layout_is_refused(tensor):
    store = open_store("memory://refused")
    with pytest.raises(CheckpointError, match="odd: cannot store"):
        upload_tensors(store, "a", {"odd": tensor})
    with pytest.raises(CheckpointError, match="no tensor can be called"):
        upload_tensors(store, "a", {"__metadata__": torch.ones(1)})
    assert list(store.list()) == []


def stored_as_it_is(path) -> StoredObject:
    data = path.read_bytes()
    return StoredObject(path.name, len(data), "", 16 * MIB, (zlib.crc32(data),))


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}', "delimiter"),
        ([GOOD], "no JSON object"),
        ('{"a": 1, "a": 2}', "twice"),
        ({"a": 1}, "other fields"),
        ({"a": GOOD | {"more": 1}}, "other fields"),
        ({"a": GOOD | {"dtype": "F31"}}, "unknown dtype"),
        ({"a": GOOD | {"dtype": ["F32"]}}, "unknown dtype"),
        ({"a": GOOD | {"shape": [-2]}}, "no counts"),
        ({"a": GOOD | {"shape": [True]}}, "no counts"),
        ({"a": GOOD | {"shape": [10**30]}}, "no counts"),
        ({"a": GOOD | {"shape": 2}}, "no counts"),
        ({"a": GOOD | {"data_offsets": [0, 8, 8]}}, "no counts"),
        ({"a": GOOD | {"shape": [3]}}, "another number of bytes"),
        ({"a": GOOD | {"data_offsets": [8, 0]}}, "another number of bytes"),
        ({"a": GOOD | {"data_offsets": [1, 9]}}, "does not begin where"),
        ({"a": GOOD, "b": GOOD}, "does not begin where"),
        ({"a": GOOD, "b": GOOD | {"data_offsets": [16, 24]}}, "does not begin where"),
        ({"a": GOOD, "b": GOOD | {"data_offsets": [8, 16]}}, "end at byte"),
        ({}, "end at byte"),
        ("[" * 100_000, "levels deep"),
    ],
)
def test_a_hostile_header_is_refused(tmp_path, header, message):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=message):
        read_headers(open_store(str(tmp_path)), [stored_as_it_is(tmp_path / "a")])


@pytest.mark.parametrize(
    "content", [b"", b"1234567", (2**63).to_bytes(8, "little"), (9).to_bytes(8, "little") + b"{}"]
)
def test_a_header_ends_within_its_object(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match="a header of"):
        read_headers(open_store(str(tmp_path)), [stored_as_it_is(tmp_path / "a")])


def test_a_long_header_takes_a_second_read(monkeypatch):
    store = open_store("memory://long")
    tensors = {"n" * 300 + str(number): torch.tensor(float(number)) for number in range(500)}
    stored = upload_tensors(store, "a", tensors)
    into = emptied(tensors)
    restore_tensors(store, [stored], into)
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors.items())
    monkeypatch.setattr(parts, "HEADER_BYTES", 1000)
    monkeypatch.setattr(layout, "HEADER_BYTES", 1000)
    with pytest.raises(CheckpointError, match="a header of"):
        read_headers(store, [stored])
    with pytest.raises(CheckpointError, match="need a header above"):
        upload_tensors(store, "b", tensors)
