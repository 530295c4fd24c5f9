import threading
import uuid
from dataclasses import replace

import pytest
import torch

from jebm.errors import CheckpointError, StoreError
from jebm.store.checkpoint import Checkpoints, Facts, FencedError
from jebm.store.storage import AccessDeniedError, open_store
from jebm.store.writer import AsyncWriter

FACTS = Facts(
    step=0,
    attempt=1,
    state={},
    config={},
    metrics={},
    provenance={},
    world_size=1,
    parent=None,
)


def tensors_of(value: float) -> dict[str, torch.Tensor]:
    return {
        "w": torch.full((32, 16), value),
        "columns": torch.full((4, 6), value).t(),
        "half": torch.full((3,), value, dtype=torch.bfloat16),
        "count": torch.tensor(int(value)),
        "none": torch.empty(0, 2),
    }


def loaded(checkpoints, manifest):
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(0).items()}
    checkpoints.load(manifest, into)
    return into


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def memory_checkpoints() -> Checkpoints:
    return Checkpoints(open_store(f"memory://{uuid.uuid4().hex}"), "run")


def test_saves_what_was_there_when_it_was_asked(proxy, s3_uri):
    checkpoints = Checkpoints(open_store(s3_uri), "run")
    writer = AsyncWriter(checkpoints, keep_last=5)
    tensors, state = tensors_of(1), {"position": [1]}
    proxy.gate.clear()  # nothing reaches the server before training has gone on
    writer.submit(tensors, replace(FACTS, step=1, state=state))
    for tensor in tensors.values():
        tensor.fill_(2)
    state["position"][0] = 2
    writer.submit(tensors, replace(FACTS, step=2, state=state))
    for tensor in tensors.values():
        tensor.fill_(3)
    assert writer.last_committed is None
    assert not writer.drain(timeout_seconds=0.05)
    proxy.gate.set()
    writer.close()
    second, first = (found.manifest for found in checkpoints.list())
    assert same(loaded(checkpoints, first), tensors_of(1))
    assert same(loaded(checkpoints, second), tensors_of(2))
    assert (first.state, second.state) == ({"position": [1]}, {"position": [2]})
    assert writer.last_committed == second


def test_training_waits_where_both_buffers_are_busy(proxy, s3_uri):
    writer = AsyncWriter(Checkpoints(open_store(s3_uri), "run"), keep_last=9)
    proxy.gate.clear()
    writer.submit(tensors_of(1), replace(FACTS, step=1))
    writer.submit(tensors_of(2), replace(FACTS, step=2))
    third = threading.Thread(target=lambda: writer.submit(tensors_of(3), replace(FACTS, step=3)))
    third.start()
    third.join(1.0)
    assert third.is_alive()
    assert writer.stats.submitted == 2
    proxy.gate.set()
    third.join(120)
    writer.close()
    stats = writer.stats
    assert (stats.submitted, stats.committed, stats.failures) == (3, 3, 0)
    assert stats.stall_seconds > 0.25
    assert stats.upload_seconds > 0
    assert stats.bytes_committed > 3 * 32 * 16 * 4


def test_every_request_that_is_made_again_is_counted(proxy, s3_uri, monkeypatch):
    monkeypatch.setattr("jebm.store.s3_calls._FIRST_WAIT_SECONDS", 0.01)
    writer = AsyncWriter(Checkpoints(open_store(s3_uri), "run"), keep_last=9)
    writer.submit(tensors_of(1), replace(FACTS, step=1))
    assert writer.drain(120)
    assert writer.stats.retries == 0
    left = {"safetensors": 3, "list-type": 1, "MANIFEST.json": 2}  # each is asked for more than once

    def strike(_method, path):
        name = next((name for name in left if name in path and left[name]), None)
        if name is None:
            return None
        left[name] -= 1
        return "busy"

    proxy.fault = strike
    writer.submit(tensors_of(2), replace(FACTS, step=2))
    writer.close()
    assert (writer.stats.committed, writer.stats.failures, writer.stats.retries) == (2, 0, 6)
    assert not any(left.values())


def test_shapes_may_change_between_saves():
    checkpoints = memory_checkpoints()
    writer = AsyncWriter(checkpoints, keep_last=9)
    for step, size in enumerate((3, 5, 4), start=1):
        writer.submit({"w": torch.full((size,), float(size))}, replace(FACTS, step=step))
    writer.close()
    for found, size in zip(checkpoints.list(), (4, 5, 3), strict=True):
        into = {"w": torch.zeros(size)}
        checkpoints.load(found.manifest, into)
        assert torch.equal(into["w"], torch.full((size,), float(size)))


def test_a_buffer_may_be_made_ready_before_the_first_save():
    checkpoints = memory_checkpoints()
    writer = AsyncWriter(checkpoints, keep_last=9, like=tensors_of(0))
    writer.submit(tensors_of(1), replace(FACTS, step=1))
    writer.submit({"w": torch.ones(3)}, replace(FACTS, step=2))  # other ones after all
    writer.close()
    assert same(loaded(checkpoints, checkpoints.list()[1].manifest), tensors_of(1))
    assert writer.stats.committed == 2


def test_old_checkpoints_go_but_never_the_one_it_came_from():
    checkpoints = memory_checkpoints()
    origin = checkpoints.save(tensors_of(1), replace(FACTS, step=1))
    writer = AsyncWriter(checkpoints, keep_last=2, protect=[origin.name])
    for step in range(2, 8):
        writer.submit(tensors_of(step), replace(FACTS, step=step, parent=origin.name))
    writer.close()
    assert [found.step for found in checkpoints.list()] == [7, 6, 1]


def test_a_later_step_of_an_attempt_before_does_not_push_out_what_was_written_now():
    """Its data may be damaged under an unchanged etag: then the run was resumed from an earlier one."""
    checkpoints = memory_checkpoints()
    origin, later = (checkpoints.save(tensors_of(step), replace(FACTS, step=step)) for step in (3, 9))
    writer = AsyncWriter(checkpoints, keep_last=1, protect=[origin.name])
    for step in (4, 5):
        writer.submit(tensors_of(step), replace(FACTS, step=step, attempt=2))
        writer.drain()
    assert [found.name for found in checkpoints.list()] == [later.name, "step-00000005-a0002", origin.name]
    assert [manifest.step for manifest in writer.kept] == [5]
    writer.submit(tensors_of(10), replace(FACTS, step=10, attempt=2))
    writer.close()
    assert [found.name for found in checkpoints.list()] == ["step-00000010-a0002", origin.name]


def test_failures_are_tolerated_and_then_raised(s3, s3_uri, monkeypatch, caplog):
    for name, value in s3.environment("reader").items():
        monkeypatch.setenv(name, value)
    writer = AsyncWriter(Checkpoints(open_store(s3_uri), "run"), keep_last=2, tolerate_failures=2)
    for step in (1, 2, 3):
        writer.submit(tensors_of(step), replace(FACTS, step=step))
        assert writer.drain(timeout_seconds=60)
        assert writer.stats.failures == step
    assert "step 2 was not saved (failure 2 in a row)" in caplog.text
    with pytest.raises(AccessDeniedError, match="may not write"):
        writer.submit(tensors_of(4), replace(FACTS, step=4))
    with pytest.raises(AccessDeniedError):
        writer.close()
    with pytest.raises(StoreError, match="closed"):
        writer.submit(tensors_of(5), replace(FACTS, step=5))


def test_a_success_forgives_the_failures_before(tmp_path, caplog):
    blocked = tmp_path / "run"
    checkpoints = Checkpoints(open_store(str(tmp_path)), "run")
    writer = AsyncWriter(checkpoints, keep_last=9, tolerate_failures=1)
    for step in range(1, 7):
        if step % 2:
            blocked.rename(tmp_path / "aside") if blocked.exists() else None
            blocked.write_text("a file where a folder should be")
        else:
            blocked.unlink()
            (tmp_path / "aside").rename(blocked) if (tmp_path / "aside").exists() else None
        writer.submit(tensors_of(step), replace(FACTS, step=step))
        writer.drain()
    writer.close()
    assert (writer.stats.failures, writer.stats.committed) == (3, 3)
    assert [found.step for found in checkpoints.list()] == [6, 4, 2]
    assert writer.last_committed.step == 6


def test_another_writer_stops_it_at_once(caplog):
    checkpoints = memory_checkpoints()
    checkpoints.save(tensors_of(0), replace(FACTS, step=1))
    writer = AsyncWriter(checkpoints, keep_last=9)
    writer.submit(tensors_of(1), replace(FACTS, step=1))
    writer.drain()
    with pytest.raises(FencedError, match="another writer"):
        writer.submit(tensors_of(2), replace(FACTS, step=2))
    with pytest.raises(FencedError):
        writer.close()
    assert [found.step for found in checkpoints.list()] == [1]


def test_a_state_that_json_cannot_hold_fails_where_it_is_given():
    writer = AsyncWriter(memory_checkpoints(), keep_last=1)
    with pytest.raises(CheckpointError, match=r"state\.loss"):
        writer.submit(tensors_of(1), replace(FACTS, step=1, state={"loss": float("nan")}))
    writer.close()
    writer.close()
    assert writer.stats.submitted == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_tensors_are_saved_as_they_were_and_come_back():
    checkpoints = memory_checkpoints()
    writer = AsyncWriter(checkpoints, keep_last=9)
    tensors = {"w": torch.full((4096, 4096), 1.0, device="cuda"), "cpu": torch.ones(3)}
    writer.submit(tensors, replace(FACTS, step=1))
    tensors["w"].fill_(2.0)
    writer.close()
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    checkpoints.load(writer.last_committed, into)
    assert torch.equal(into["w"], torch.full_like(into["w"], 1.0))
