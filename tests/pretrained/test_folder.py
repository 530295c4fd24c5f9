"""A model's folder: written from a run, loaded again bit for bit, and refused if anything in it is wrong."""

import hashlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from made_models import CONFIG, save

import jebm
from jebm.config import Data, Energy, Run
from jebm.core.model import build_model
from jebm.data.dataset import ImageSet
from jebm.data.loader import to_float
from jebm.errors import CheckpointError, ConfigError, DataError, JebmError
from jebm.evaluate.subject import Subject
from jebm.parser import config_from_dict
from jebm.pretrained.card import command_of
from jebm.pretrained.folder import Place, read_description, read_weights, shareable
from jebm.pretrained.write import export
from jebm.store.sealed import sealed
from jebm.store.storage import Store, open_store

Where = Callable[[str], str]


@pytest.fixture
def folder(place: Where) -> str:
    """Return the URI of an exported model."""
    save(place("runs/mine"))
    export(place("runs/mine"), open_store(place("model")))
    return place("model")


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 1), np.uint8)


def test_it_is_the_averaged_model_bit_for_bit_and_any_safetensors_reader_reads_it(folder: str) -> None:
    found = jebm.from_pretrained(folder)
    wanted = build_model(replace(CONFIG, run=replace(CONFIG.run, seed=4))).state_dict()
    plain = safetensors.torch.load(open_store(folder).get("model.safetensors"))
    for tensors in (found.model.state_dict(), plain):
        assert tensors.keys() == wanted.keys()
        assert all(tensors[name].equal(wanted[name]) for name in wanted)
    assert not any(each.requires_grad or each.grad_fn for each in found.model.parameters())
    facts = ("run", "step", "weights", "data_sha256", "workers")
    assert [found.origin[name] for name in facts] == ["mine", "7", "averaged", "ab" * 32, "2"]
    content = json.loads(open_store(folder).get("config.json"))
    assert (content["images"]["shape"], content["latents"]) == ([1, 16, 16], [2, 3, 4])


def test_a_run_loads_as_its_export_does_and_samples_do_not_depend_on_how_many(
    folder: str, place: Where
) -> None:
    exported, run = jebm.from_pretrained(folder), jebm.from_pretrained(place("runs/mine"))
    samples = exported.sample(300, seed=5)
    assert (samples.shape, samples.min() >= -1, samples.max() <= 1) == ((300, 1, 16, 16), True, True)
    assert run.sample(7, seed=5).allclose(samples[:7], atol=1e-6)  # another batch rounds in another way
    assert not exported.sample(7, seed=6).allclose(samples[:7], atol=1e-3)
    assert run.origin == exported.origin


def test_codes_are_those_of_the_posterior(folder: str) -> None:
    found, images = jebm.from_pretrained(folder), pixels(260)
    codes, floats = found.encode(images), to_float(images, "cpu")
    assert codes.mean_ND.allclose(found.model.mean_code(floats), atol=1e-5)
    assert (codes.sample_ND.shape, codes.rate_NL.shape) == ((260, 9), (260, 3))
    assert not codes.sample_ND.allclose(codes.mean_ND, atol=1e-3)
    again = found.encode(floats)
    assert all(one.equal(other) for one, other in zip(codes, again, strict=True))
    assert found.encode(images[:5]).sample_ND.allclose(codes.sample_ND[:5], atol=1e-5)
    assert found.encode(images[:252]).sample_ND[250:].allclose(codes.sample_ND[250:252], atol=1e-5)
    assert found.decode(codes.mean_ND).allclose(found.model.decode(codes.mean_ND), atol=1e-5)


def test_the_bound_is_that_of_an_evaluation(place: Where) -> None:
    save(place("runs/mine"), replace(CONFIG, energy=Energy(width=0)))
    found, images = jebm.from_pretrained(place("runs/mine")), pixels(300)
    held: Any = ImageSet(images, None, None)  # type: ignore[arg-type]
    expected = Subject(found.model, found.config, held).likelihood(images)
    assert found.likelihood(images) == expected
    assert found.likelihood(to_float(images, "cpu")) == expected


def test_log_z_is_the_mean_of_the_tilt(folder: str) -> None:
    found = jebm.from_pretrained(folder)
    draws = torch.randn(200_000, 9, generator=torch.Generator().manual_seed(0))
    f = found.model.f(draws).double()
    assert f.std() > 0.01
    exact = f.exp().mean().log()
    assert abs(found.log_z.value - exact) < 4 * (found.log_z.standard_error + f.exp().std() / 200_000**0.5)


@pytest.mark.parametrize(
    "images",
    [pixels(3)[..., 0], pixels(3)[:, :8], pixels(3).astype(float), torch.zeros(3, 16, 16, 1), pixels(0)],
)
def test_images_of_another_kind_are_refused_in_one_line(folder: str, images: Any) -> None:
    with pytest.raises(
        DataError, match=r"give uint8 pixels \(N, 16, 16, 1\) or a float tensor \(N, 1, 16, 16\)"
    ):
        jebm.from_pretrained(folder).encode(images)


def test_nothing_in_it_tells_of_buckets_or_folders(folder: str) -> None:
    store = open_store(folder)
    everything = b"".join(store.get(info.key) for info in store.list())
    for secret in (b"secret-bucket", b"hidden", b"somebody", b"s3://"):
        assert secret not in everything
    assert jebm.from_pretrained(folder).config.data.train == "train"
    bare = replace(
        CONFIG, run=Run(storage="s3://secret"), data=Data(train="s3://secret/", held_out="s3://secret/a/b/")
    )
    assert "secret" not in str(shareable(bare))
    assert shareable(bare)["data"] == {
        "train": "train",
        "held_out": "b",
        "validation": None,
        "cache_gb": None,
    }
    given = {"table": "s3://secret/a/t.npy", "store": "s3://secret", "more": ["/secret/b/", "plain"], "n": 3}
    by_class = {"class_path": "mylab.Mine", "init_args": given}
    own = config_from_dict({"energy": by_class, "evaluation": {"features": by_class}})
    cut = {"table": "t.npy", "store": "store", "more": ["b", "plain"], "n": 3}
    assert shareable(own)["energy"]["init_args"] == cut
    assert shareable(own)["evaluation"]["features"]["init_args"] == cut
    assert "secret" not in command_of(own, {"workers": "1"})
    assert own.energy.init_args["table"] == "s3://secret/a/t.npy"


def rewrite(store: Store, change: Callable[[dict[str, Any]], object]) -> None:
    """Change config.json and seal it again, as somebody would who wants it believed."""
    content = json.loads(store.get("config.json"))
    content.pop("sha256")
    change(content)
    store.put("config.json", sealed(content))


def reweigh(store: Store, data: bytes) -> None:
    """Put other bytes in the place of the weights, with a description that fits them."""
    store.put("model.safetensors", data)
    facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(store, lambda content: content["weights"].update(facts))


def flipped(data: bytes, byte: int) -> bytes:
    return data[:byte] + bytes([data[byte] ^ 1]) + data[byte + 1 :]


def pickled() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, file)
    return file.getvalue()


def weights_with(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Store], None]:
    def tamper(store: Store) -> None:
        tensors = safetensors.torch.load(store.get("model.safetensors"))
        change(tensors)
        reweigh(store, safetensors.torch.save(tensors))

    return tamper


CONFIG_KEY, WEIGHTS_KEY = "config.json", "model.safetensors"
TAMPERED: dict[str, tuple[Callable[[Store], object], str]] = {
    "no config": (lambda s: s.delete([CONFIG_KEY]), "config.json: is missing"),
    "no weights": (lambda s: s.delete([WEIGHTS_KEY]), "model.safetensors: is missing"),
    "no files": (lambda s: s.delete([info.key for info in s.list()]), "nothing here"),
    "config cut": (lambda s: s.put(CONFIG_KEY, s.get(CONFIG_KEY)[:-9]), "config.json: is damaged"),
    "config flipped": (
        lambda s: s.put(CONFIG_KEY, flipped(s.get(CONFIG_KEY), 300)),
        "config.json: is damaged",
    ),
    "config edited": (
        lambda s: s.put(CONFIG_KEY, s.get(CONFIG_KEY).replace(b'"step":"7"', b'"step":"9"')),
        "does not match the hash",
    ),
    "config huge": (lambda s: s.put(CONFIG_KEY, b" " * (2 << 20)), "more than 1048576 bytes"),
    "a list": (lambda s: s.put(CONFIG_KEY, b"[1]"), "it is no JSON object"),
    "format": (lambda s: rewrite(s, lambda c: c.update(format="gpt")), "its format is not jebm-model"),
    "version": (lambda s: rewrite(s, lambda c: c.update(version=2)), "jebm-model version 1"),
    "origin": (lambda s: rewrite(s, lambda c: c["origin"].update(step=7)), "step is a int"),
    "unknown key": (
        lambda s: rewrite(s, lambda c: c["config"]["energy"].update(widht=7)),
        "unknown key energy.widht",
    ),
    "other shapes": (
        lambda s: rewrite(s, lambda c: c["config"]["energy"].update(width=9)),
        "has shape [8, 9], and by its config [9, 9]",
    ),
    # Nets of terabytes: refused before any of them is allocated.
    "huge nets": (
        lambda s: rewrite(s, lambda c: c["config"]["energy"].update(width=10**6)),
        "has shape [8, 9], and by its config [1000000, 9]",
    ),
    "nets beyond any memory": (
        lambda s: rewrite(s, lambda c: c["config"]["energy"].update(width=10**12)),
        "the nets of its config cannot be built",
    ),
    "nets beyond any number": (
        lambda s: rewrite(s, lambda c: c["config"]["energy"].update(width=10**30)),
        "the nets of its config cannot be built",
    ),
    "other types": (
        weights_with(lambda t: t.update({name: each.double() for name, each in t.items()})),
        "is torch.float64, and in the model torch.float32",
    ),
    "weights cut": (lambda s: s.put(WEIGHTS_KEY, s.get(WEIGHTS_KEY)[:-4]), "bytes instead of"),
    "weights flipped": (
        lambda s: s.put(WEIGHTS_KEY, flipped(s.get(WEIGHTS_KEY), -1 % len(s.get(WEIGHTS_KEY)))),
        "does not match the sha256 in config.json",
    ),
    "a pickle": (lambda s: reweigh(s, pickled()), "is no safetensors file"),
    "a long header": (lambda s: reweigh(s, b"\xff" * 8 + b"{}"), "is no safetensors file"),
    "three bytes": (lambda s: reweigh(s, b"abc"), "is no safetensors file"),
    "a tensor less": (weights_with(lambda t: t.popitem()), "is missing, and its config has it"),
    "a tensor more": (weights_with(lambda t: t.update(x=torch.ones(2))), "tensor x is not in the nets"),
    "not finite": (
        weights_with(lambda t: next(iter(t.values())).view(-1)[:1].fill_(torch.nan)),
        "holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_folder_is_refused_in_one_line(folder: str, how: str) -> None:
    tamper, words = TAMPERED[how]
    tamper(open_store(folder))
    with pytest.raises(CheckpointError) as refused:
        jebm.from_pretrained(folder)
    message = str(refused.value)
    assert words in message
    assert "memory://" in message
    assert "\n" not in message


def test_code_of_others_is_not_imported_unless_trusted(
    folder: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lurking_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    other = {"class_path": "lurking_module.Evil", "init_args": {}}
    rewrite(open_store(folder), lambda content: content["config"].update(energy=other))
    for trust in ((), ["elsewhere"], "elsewhere"):
        with pytest.raises(ConfigError, match="lurking_module, which is not trusted here") as refused:
            jebm.from_pretrained(folder, trust)
        assert "\n" not in str(refused.value)
        assert "lurking_module" not in sys.modules
    with pytest.raises(ConfigError, match="lurking_module cannot be imported: SystemExit: imported"):
        jebm.from_pretrained(folder, trust=["lurking_module"])


def test_a_class_that_looks_at_its_weights_loads(
    folder: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "looking_module.py").write_text(
        "import torch\n"
        "from jebm.parts import Energy\n"
        "SCALE = torch.tensor(2.0)\n"
        "class Looking(Energy):\n"
        "    def __init__(self, layers):\n"
        "        super().__init__(layers)\n"
        "        self.factor = SCALE.item()\n"
        "    def forward(self, z_BD):\n"
        "        return self.factor * z_BD.sum(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "looking_module", raising=False)
    weights_with(lambda t: [t.pop(name) for name in list(t) if name.startswith("energy.")])(
        open_store(folder)
    )
    other = {"class_path": "looking_module.Looking", "init_args": {}}
    rewrite(open_store(folder), lambda content: content["config"].update(energy=other))
    energy = jebm.from_pretrained(folder, trust=["looking_module"]).model.energy
    assert energy is not None
    assert energy(torch.ones(2, 9)).tolist() == [18.0, 18.0]


@dataclass
class Flaky:
    """A store whose first answers have one bit wrong."""

    store: Store
    wrong: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def get(self, key: str) -> bytes:
        self.wrong -= 1
        data = self.store.get(key)
        return flipped(data, 50) if self.wrong >= 0 else data

    def read_into(self, key: str, offset: int, pieces: list[memoryview], *, etag: str | None = None) -> None:
        self.store.read_into(key, offset, pieces, etag=etag)
        self.wrong -= 1
        if self.wrong >= 0:
            pieces[0][9] ^= 4


def test_a_wrong_answer_of_the_store_is_asked_for_again(folder: str) -> None:
    place = Place(open_store(folder))
    description = read_description(Place(Flaky(place.store, 2)))  # type: ignore[arg-type]
    wanted = read_weights(place, description)
    found = read_weights(Place(Flaky(place.store, 2)), description)  # type: ignore[arg-type]
    assert all(found[name].equal(wanted[name]) for name in wanted)
    with pytest.raises(CheckpointError, match="does not match the sha256"):
        read_weights(Place(Flaky(place.store, 3)), description)  # type: ignore[arg-type]


@pytest.mark.parametrize("uri", ["hf://name", "hf://a/b/c", "hf://a/b@", "hf://a/b?x"])
def test_a_place_of_the_hub_is_read_strictly(uri: str) -> None:
    with pytest.raises(JebmError, match="write hf://org/name"):
        jebm.from_pretrained(uri)
