"""The job that draws samples: what is in its files, and how it ends."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jebm.commands import run_command
from jebm.config import Config, Energy, Generator, Inference, Langevin, Model, config_to_dict
from jebm.core.model import JointModel, build_model
from jebm.data.loader import to_uint8
from jebm.store.checkpoint import Facts
from jebm.store.retrieve import open_run
from jebm.store.storage import open_store

SIZE = 16

Arrays = dict[str, np.ndarray]


def config(*, gaussian: bool = False) -> Config:
    return Config(
        model=Model(image_size=SIZE, image_channels=1, latent_dims=[2, 3, 4]),
        inference=Inference(channels=[4, 4], width=8),
        generator=Generator(channels=[4, 4], width=8),
        energy=Energy(width=0 if gaussian else 8, output_scale=4.0),
        langevin=Langevin(steps=20, step_size=0.4),
    )


def save(
    uri: str, *, gaussian: bool = False, change: Callable[[JointModel], object] | None = None
) -> JointModel:
    """Save an untrained model as the checkpoint of a run, and return it."""
    model = build_model(config(gaussian=gaussian)).eval().requires_grad_(requires_grad=False)
    if change is not None:
        change(model)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    plain = config_to_dict(config(gaussian=gaussian))
    facts = Facts(
        step=3, attempt=1, state={}, config=plain, metrics={}, provenance={}, world_size=1, parent=None
    )
    open_run(uri).checkpoints.save(tensors, facts)
    return model


def read(npz: bytes) -> Arrays:
    with np.load(io.BytesIO(npz), allow_pickle=False) as file:
        return dict(file)


Sample = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sample:
    """Run the job in this process: `sample("--count", 3, …)` returns exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run_command("sample")
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, JointModel]:
    uri = str(tmp_path_factory.mktemp("runs") / "joint")
    return uri, save(uri)


@pytest.fixture
def arrays(sample: Sample, joint: tuple[str, JointModel], tmp_path: Path) -> Callable[..., Arrays]:
    """Return the arrays of all .npz files that the job writes with these arguments."""
    places = iter(range(100))

    def call(count: int, *arguments: object, run_uri: str = joint[0]) -> Arrays:
        output = tmp_path / str(next(places))
        code, _, error = sample(
            "--checkpoint", run_uri, "--count", count, "--format", "npz", "--output", output, *arguments
        )
        assert code == 0, error
        parts = [read(path.read_bytes()) for path in sorted(output.glob("samples-*.npz"))]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return call


def test_images_are_what_the_generator_makes_of_the_latents(
    arrays: Callable[..., Arrays], joint: tuple[str, JointModel]
) -> None:
    found = arrays(30)
    assert {name: (array.shape, array.dtype.str[1:]) for name, array in found.items()} == {
        "images": ((30, SIZE, SIZE, 1), "u1"),
        "z1": ((30, 2), "f4"),
        "z2": ((30, 3), "f4"),
        "z3": ((30, 4), "f4"),
    }
    z = torch.from_numpy(np.concatenate([found["z1"], found["z2"], found["z3"]], 1))
    expected = to_uint8(joint[1].decode(z)).permute(0, 2, 3, 1).numpy()
    assert np.abs(expected.astype(int) - found["images"]).max() <= 1  # another batch rounds in another way
    assert found["images"].std() > 1


def test_all_formats_show_the_same_samples_for_any_count(
    sample: Sample, arrays: Callable[..., Arrays], joint: tuple[str, JointModel], tmp_path: Path
) -> None:
    images = arrays(300)["images"][..., 0]
    assert np.array_equal(arrays(7)["images"][..., 0], images[:7])
    assert not np.array_equal(arrays(7, "--seed", 1)["images"][..., 0], images[:7])
    for form in ("png", "grid"):
        code, out, _ = sample(
            *("--checkpoint", joint[0], "--count", 253, "--format", form, "--output", tmp_path / form)
        )
        assert code == 0
        assert out.startswith(f"253 samples in {253 if form == 'png' else 2} files: ")
    for index in (0, 12, 252):
        single = np.asarray(Image.open(tmp_path / "png" / f"{index:08d}.png"))
        page = np.asarray(Image.open(tmp_path / "grid" / f"page-{index // 250:05d}.png"))
        row, column = divmod(index % 250, 10)
        top, left = row * (SIZE + 1), column * (SIZE + 1)
        assert np.array_equal(single, images[index])
        assert np.array_equal(page[top : top + SIZE, left : left + SIZE], images[index])
    last = np.asarray(Image.open(tmp_path / "grid" / "page-00001.png"))
    assert last.shape == (SIZE, 10 * (SIZE + 1) - 1)
    assert (last[:, 3 * (SIZE + 1) :] == 255).all()  # nothing beside the last three


def test_one_layer_varies_along_a_row(arrays: Callable[..., Arrays]) -> None:
    found = arrays(23, "--vary", "z2", "--columns", 5)
    for first in range(0, 23, 5):
        rows = {name: found[name][first : first + 5] for name in ("z1", "z2", "z3")}
        assert (rows["z1"] == rows["z1"][0]).all()
        assert (rows["z3"] == rows["z3"][0]).all()
        assert len(np.unique(rows["z2"], axis=0)) == len(rows["z2"])
    assert len(np.unique(found["z3"], axis=0)) == 5


def test_chains_are_those_of_the_run_unless_others_are_asked_for(
    arrays: Callable[..., Arrays], tmp_path: Path
) -> None:
    save(str(tmp_path / "gaussian"), gaussian=True)
    exact = arrays(2000, run_uri=str(tmp_path / "gaussian"))["z3"]
    assert np.abs(exact.mean(0)).max() < 4 / 2000**0.5
    assert np.abs(exact.var(0) - 1).max() < 4 * (2 / 2000) ** 0.5
    # A chain that hardly moves ends where it begins: in the noise that the Gaussian prior takes as it is.
    still = arrays(2000, "--steps", 1, "--step-size", 1e-6)["z3"]
    assert np.abs(still - exact).max() < 1e-4
    assert np.abs(arrays(2000)["z3"] - exact).mean() > 0.5


def test_many_samples_come_in_parts(sample: Sample, joint: tuple[str, JointModel], tmp_path: Path) -> None:
    output = tmp_path / "parts"
    code, out, _ = sample(
        *("--checkpoint", joint[0], "--count", 5100, "--steps", 1, "--format", "npz", "--output", output)
    )
    assert (code, out) == (0, f"5100 samples in 2 files: {output}\n")
    sizes = [len(read((output / f"samples-0000{part}.npz").read_bytes())["images"]) for part in (0, 1)]
    assert sizes == [5000, 100]
    facts = json.loads((output / "samples.json").read_text())
    assert facts["checkpoint"].endswith("/joint/checkpoints/step-00000003-a0001")
    assert (facts["count"], facts["files"], facts["langevin"]["steps"]) == (5100, 2, 1)


def test_samples_go_from_bucket_to_bucket(sample: Sample, s3_uri: str) -> None:
    save(f"{s3_uri}/runs/mine")
    code, out, error = sample(
        *("--checkpoint", f"{s3_uri}/runs/mine", "--count", 4, "--format", "npz", "--output", f"{s3_uri}/out")
    )
    assert (code, out) == (0, f"4 samples in 1 file: {s3_uri}/out\n"), error
    store = open_store(f"{s3_uri}/out")
    assert [info.key for info in store.list()] == ["samples-00000.npz", "samples.json"]
    assert len(read(store.get("samples-00000.npz"))["images"]) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--count", "0"], "--count 0: must be 1 or more"),
        (["--columns", "0"], "--columns 0: must be 1 or more"),
        (["--columns", "100000000"], "--columns 100000000: must be 1000 or less"),
        (["--count", "many"], "count: "),
        (["--format", "gif"], "format: "),
        (["--vary", "z4"], "--vary z4: this model has z1 (bottom) to z3 (top)"),
        (["--vary", "2"], "--vary 2: this model has z1 (bottom) to z3 (top)"),
        (["--steps", "0", "--checkpoint", "/nowhere"], "--steps 0: must be at least 1"),
        (["--step-size", "5", "--checkpoint", "/nowhere"], "--step-size 5: must lie between 0 and 2"),
        (["--seed", "-1"], "--seed: -1 must lie between 0 and 2**63 - 1"),
        (["--seed", str(10**23)], "must lie between 0 and 2**63 - 1"),
        (["--colums", "3"], "unknown option --colums; did you mean --columns?"),
        (["--checkpoint", "/nowhere/at/all"], "no such run"),
    ],
)
def test_bad_input_is_one_line(
    sample: Sample, joint: tuple[str, JointModel], tmp_path: Path, arguments: list[str], said: str
) -> None:
    output = tmp_path / "out"
    code, out, error = sample("--checkpoint", joint[0], "--count", 3, "--output", output, *arguments)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not output.exists() or not list(output.iterdir())


def test_samples_are_not_mixed_with_others(
    sample: Sample, joint: tuple[str, JointModel], tmp_path: Path
) -> None:
    arguments = ("--checkpoint", joint[0], "--count", 3, "--output", tmp_path / "out")
    assert sample(*arguments)[0] == 0
    code, _, error = sample(*arguments)
    assert (code, error) == (2, f"error: --output {tmp_path / 'out'}: is not empty; name another place\n")


def test_without_a_place_each_time_another_folder_is_made(
    sample: Sample, joint: tuple[str, JointModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").mkdir()  # empty, as a start with a wrong value leaves it
    places = [sample("--checkpoint", joint[0], "--count", 3)[1].split(": ")[1].strip() for _ in range(3)]
    assert places == [str(tmp_path / name) for name in ("samples", "samples-2", "samples-3")]


def test_the_gaussian_prior_takes_no_chain(sample: Sample, tmp_path: Path) -> None:
    save(str(tmp_path / "mine"), gaussian=True)
    code, _, error = sample(
        *("--checkpoint", tmp_path / "mine", "--count", 3, "--steps", 5, "--output", tmp_path / "out")
    )
    assert (code, error.count("\n")) == (2, 1)
    assert "this model has the Gaussian prior, which needs no chain" in error


@pytest.mark.parametrize(
    ("value", "words"), [(torch.nan, "weight holds NaN or infinity"), (3e38, "samples are not finite")]
)
def test_samples_that_are_not_finite_are_refused(
    sample: Sample, tmp_path: Path, value: float, words: str
) -> None:
    save(str(tmp_path / "mine"), change=lambda model: next(model.generator.parameters()).fill_(value))
    code, _, error = sample("--checkpoint", tmp_path / "mine", "--count", 3, "--output", tmp_path / "out")
    assert (code, error.count("\n")) == (2, 1)
    assert words in error


def test_the_help_shows_how(sample: Sample) -> None:
    code, out, _ = sample("--help")
    assert code == 0
    assert "jebm sample --checkpoint s3://bucket/runs/mine --count 100" in out
