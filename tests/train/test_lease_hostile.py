"""What else may lie in a run's lease folder: damaged, planted, of a future version. No run is lost to it."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from jebm.errors import ConfigError
from jebm.store.protocol import ObjectInfo
from jebm.store.sealed import sealed
from jebm.store.storage import LocalStore, open_store
from jebm.train.lease import Lease, _Holder

BEAT_SECONDS = 0.2
HOLDER = _Holder(
    token="0" * 32,
    host="node-1.example",
    pid=4711,
    since="2026-01-01T00:00:00Z",
    ray_job="",
    beat=3,
    released=False,
)


def lease(place: Path | LocalStore, **keywords: str) -> Lease:
    store = place if isinstance(place, LocalStore) else open_store(str(place))
    return Lease(store, beat_seconds=BEAT_SECONDS, **keywords)  # type: ignore[arg-type]


def content(**changes: object) -> dict[str, object]:
    """What an object of the lease says, as JSON without its hash."""
    said: dict[str, object] = json.loads(HOLDER.encode())
    del said["sha256"]
    return said | changes


ODD_KEYS = [
    "lease/99999999999999999.json",  # more digits than a number has
    "lease/٠٠٠٠٠٠٠٩.json",  # digits, but not ours
    "lease/\uff10\uff10\uff10\uff10\uff10\uff10\uff19\uff19.json",
    "lease/0000000009.json",  # another spelling
    "lease/9.json",
    "lease/-0000009.json",
    "lease/00000009.json.bak",
    "lease/00000009/x.json",
    "lease/notes.txt",
]


def test_what_is_no_object_of_the_lease_is_no_matter_and_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path))
    for key in ODD_KEYS:
        store.put(key, b"[" * 100_000)
    with caplog.at_level("INFO", "jebm.train"), lease(tmp_path):
        assert store.head("lease/00000001.json") is not None
    assert caplog.messages == []  # nobody was watched
    assert {info.key for info in store.list()} == {*ODD_KEYS, "lease/00000001.json"}


DAMAGED = {
    "nothing": b"",
    "no JSON": b"\xff[",
    "deep": b"[" * 100_000,
    "deep in a field": json.dumps(content())
    .encode()
    .replace(b'"host":', b'"x":' + b"[" * 3000 + b"]" * 3000 + b',"host":'),
    "huge": b" " * 5_000_000,
    "no object": b"[1]",
    "without a hash": json.dumps(content()).encode(),
    "of the first version": json.dumps(
        {"token": "", "host": "x", "pid": 1, "since": "", "stop": "rm -rf ~", "beat": 0, "released": True}
    ).encode(),
    "of a future version": sealed(content(version=3, released=True)),
    "unknown fields": sealed(content(more=1)),
    "released is no boolean": sealed(content(released=1)),
    "a huge number": sealed(content(pid=10**40)),
    "another type": sealed(content(host=["x"])),
    "a command for a name": sealed(content(host="x; rm -rf ~")),
    "a command for a job": sealed(content(ray_job="x; rm -rf ~")),
    "an option for a job": sealed(content(ray_job="--address=evil")),
    "an escape": sealed(content(since="\x1b[2J")),
    "a line break": sealed(content(host="x\n")),
}


@pytest.mark.parametrize(
    ("what", "number"),
    [*((what, 8) for what in DAMAGED), ("no JSON", 99_999_999), ("of the first version", 10**14)],
)
def test_what_cannot_be_read_is_watched_and_then_followed(
    tmp_path: Path, what: str, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path))
    store.put(f"lease/{number:08d}.json", DAMAGED[what])
    with caplog.at_level("INFO", "jebm.train"), lease(tmp_path):
        assert [info.key for info in store.list()] == [f"lease/{number + 1:08d}.json"]
    assert caplog.messages[0].endswith(f"(lease/{number:08d}.json cannot be read); watching it for 1 s")
    assert "rm -rf" not in caplog.text


def test_who_cannot_be_read_and_lives_keeps_the_run(tmp_path: Path) -> None:
    """A job of a future version: its object changes, and that is life."""
    store = open_store(str(tmp_path))
    over = threading.Event()

    def beat() -> None:
        beats = 0
        while not over.wait(BEAT_SECONDS / 2):
            beats += 1
            store.put("lease/00000004.json", sealed(content(version=3, beat=beats)))

    store.put("lease/00000004.json", sealed(content(version=3)))
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError) as refused, lease(tmp_path):
            pytest.fail("two hold one run")
    finally:
        over.set()
        thread.join()
    assert "in training by another process; stop it (lease/00000004.json), or choose" in str(refused.value)


def test_the_last_number_is_named_before_anything_starts(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    key = f"lease/{10**15 - 1}.json"
    for said in (b"x", HOLDER.encode(), dataclasses.replace(HOLDER, released=True).encode()):
        store.put(key, said)
        with pytest.raises(ConfigError, match=rf"^run.name: .*/{key} leaves no number .* delete this object"):
            lease(tmp_path).__enter__()
        assert [info.key for info in store.list()] == [key]
    store.delete([key])
    with lease(tmp_path):
        pass


@pytest.mark.parametrize(
    ("ray_job", "command"),
    [
        ("raysubmit_x7Kq", "ray job stop raysubmit_x7Kq"),
        ("nightly.2", "ray job stop nightly.2"),
        ("x; rm -rf ~", None),
        ("--address", None),
        ("a\nb", None),
        ("", None),
    ],
)
def test_a_stop_command_is_one_that_we_made(tmp_path: Path, ray_job: str, command: str | None) -> None:
    with lease(tmp_path, ray_job=ray_job) as held:
        with pytest.raises(ConfigError) as refused, lease(tmp_path):
            pytest.fail("two hold one run")
        expected = command or f"kill {held._holder.pid}"
        assert f"; stop it there ({expected}), or choose another run.name" in str(refused.value)


def test_no_bit_of_a_holder_can_be_another() -> None:
    encoded = HOLDER.encode()
    assert _Holder.decode(encoded) == HOLDER
    for bit in range(8 * len(encoded)):
        spoiled = bytearray(encoded)
        spoiled[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r"."):
            _Holder.decode(bytes(spoiled))


class Flipping(LocalStore):
    """A folder from which one answer comes back with a bit flipped: `spoil` says what of, and how."""

    listing: Callable[[ObjectInfo], ObjectInfo] | None = None
    reading: Callable[[memoryview], None] | None = None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        spoil, self.listing = self.listing, None
        for info in super().list(prefix):
            yield info if spoil is None else spoil(info)

    def read_into(
        self, key: str, offset: int, pieces: Sequence[memoryview], *, etag: str | None = None
    ) -> None:
        super().read_into(key, offset, pieces, etag=etag)
        spoil, self.reading = self.reading, None
        if spoil is not None:
            spoil(pieces[0])


def set_bit(piece: memoryview) -> None:
    piece[40] ^= 1


def test_a_holder_with_a_flipped_bit_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with lease(tmp_path):
        pass
    store = Flipping(tmp_path)
    store.reading = set_bit
    with caplog.at_level("INFO", "jebm.train"), lease(store):
        assert store.reading is None
    assert caplog.messages == []  # it was released, and is not taken for an unknown process


@pytest.mark.parametrize(
    "spoil",
    [
        lambda info: dataclasses.replace(info, etag=f"{info.etag}x"),
        lambda info: dataclasses.replace(info, key=info.key.replace("0000000", "0000400")),
        lambda info: dataclasses.replace(info, key=info.key.replace("lease", "leasd")),
    ],
)
def test_a_flipped_bit_in_a_listing_is_no_sign_of_life_and_takes_no_run_away(
    tmp_path: Path, spoil: Callable[[ObjectInfo], ObjectInfo], caplog: pytest.LogCaptureFixture
) -> None:
    open_store(str(tmp_path)).put("lease/00000001.json", HOLDER.encode())  # dead
    store = Flipping(tmp_path)
    store.listing = spoil
    looks = threading.Timer(2 * BEAT_SECONDS, lambda: setattr(store, "listing", spoil))
    looks.start()
    with lease(store):  # neither at its start, nor while it watches, nor while it beats
        store.listing = spoil
        time.sleep(4 * BEAT_SECONDS)
        assert store.listing is None
    assert "has taken over" not in caplog.text
    assert _Holder.decode(store.get("lease/00000002.json")).released
