"""The model card: figures with intervals and warnings of the evaluation, and the command that made it."""

import io
import json
import shlex
from collections.abc import Callable
from dataclasses import replace

import pytest
import yaml
from made_models import CONFIG, save
from PIL import Image

from jebm.config import Config, Evaluation, Features, config_to_dict, leaves, role_of
from jebm.parser import argument_parser, parse_arguments
from jebm.pretrained.card import command_of
from jebm.pretrained.write import export
from jebm.report.findings import Figure, Findings, Picture, Section
from jebm.report.write import write_report
from jebm.store.storage import open_store

Where = Callable[[str], str]


def png(color: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), color).save(file, "PNG")
    return file.getvalue()


def findings(step: int, elbo: float, attempt: int = 1) -> Findings:
    checkpoint = f"s3://bucket/runs/mine/checkpoints/step-{step:08d}-a{attempt:04d}"
    figures = (
        Figure("ELBO", elbo, 2.0, "nats", "higher", "Lower bound of log p(x)."),
        Figure("undefined", None, None, "", None, "Nothing."),
    )
    return Findings(
        "mine",
        (),
        {"step": str(step), "checkpoint": checkpoint, "data": "fashion <b>| (test), the first 100 images"},
        {},
        (
            Section("likelihood", "Likelihood", "How likely.", figures=figures, warnings=("log Z is | odd",)),
            Section("samples", "Samples", "", pictures=(Picture("page", "prior.png", png(9), ""),)),
        ),
    )


def exported(place: Where) -> tuple[dict[str, object], str, bytes | None]:
    """Export the run and return the card's metadata, its text, and the sheet of samples if there is one."""
    export(place("runs/mine"), open_store(place("model")))
    store = open_store(place("model"))
    _, front, text = store.get("README.md").decode().split("---\n", 2)
    sheet = store.get("pictures/samples.png") if store.head("pictures/samples.png") else None
    return yaml.safe_load(front), text, sheet


def test_figures_have_intervals_and_warnings_come_first(place: Where) -> None:
    repocard_data = pytest.importorskip("huggingface_hub.repocard_data")
    save(place("runs/mine"))
    run = open_store(place("runs/mine"))
    write_report(findings(7, -231.5), run.child("evaluations/step-00000007-quick"), "evaluation")
    write_report(findings(8, -100.0), run.child("evaluations/step-00000008-quick"), "evaluation")  # newer
    write_report(findings(7, -99.0, attempt=2), run.child("evaluations/again"), "evaluation")
    run.put("evaluations/broken/evaluation.json", b"{")
    front, text, sheet = exported(place)
    assert "| ELBO | -231.5 | -235.4 to -227.6 | nats | higher | Lower bound of log p(x). |" in text
    assert text.index("Likelihood: log Z is \\| odd") < text.index("-231.5")
    assert "fashion &lt;b&gt;\\| (test), the first 100 images" in text
    assert "![A sheet of samples](<pictures/samples.png>)" in text
    assert sheet == png(9)
    (model,) = front["model-index"]
    assert model["results"][0]["metrics"] == [{"type": "ELBO", "value": -231.5}]
    (result,) = repocard_data.model_index_to_eval_results(front["model-index"])[1]
    assert (result.metric_type, result.metric_value) == ("ELBO", -231.5)  # as the hub's own library reads it
    assert "license" not in front
    assert "# license:" in open_store(place("model")).get("README.md").decode()


def test_a_feature_net_of_ones_own_asks_nobody_for_trust(place: Where) -> None:
    features = Features(class_path="absent")  # the short name of a package that is not here
    save(place("runs/mine"), replace(CONFIG, evaluation=Evaluation(features=features)))
    _, text, _ = exported(place)
    assert "trust" not in text
    assert "It needs the module" not in text


def test_without_an_evaluation_it_says_so(place: Where) -> None:
    save(place("runs/mine"))
    run = open_store(place("runs/mine"))
    for step, color in ((5, 50), (7, 70), (9, 90)):
        run.put(f"pictures/step-{step:08d}.png", png(color))
    front, text, sheet = exported(place)
    assert "Measured during training" in text
    assert "| ELBO | -230.5 | – | nats | higher |" in text  # noqa: RUF001
    assert "model-index" not in front
    assert sheet == png(70)  # not of a later step


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["sections"][0]["figures"][0].update(value="much"),
        lambda d: d.update(provenance=[]),
    ],
)
def test_a_damaged_evaluation_is_passed_over(
    place: Where, change: Callable[[dict[str, object]], object], caplog: pytest.LogCaptureFixture
) -> None:
    save(place("runs/mine"))
    run = open_store(place("runs/mine")).child("evaluations/step-00000007-quick")
    write_report(findings(7, -231.5), run, "evaluation")
    document = json.loads(run.get("evaluation.json"))
    change(document)
    run.put("evaluation.json", json.dumps(document).encode())
    _, text, _ = exported(place)
    assert "Measured during training" in text
    assert "passed over" in caplog.text


def test_the_command_trains_the_same_config() -> None:
    words = shlex.split(command_of(CONFIG, {"workers": "2"}))
    assert words[:2] == ["jebm", "train"]
    found, _ = parse_arguments(argument_parser(""), words[2:])

    def shaping(each: Config) -> dict[str, object]:
        plain = dict(leaves(config_to_dict(each)))
        return {key: value for key, value in plain.items() if role_of(key) in ("result", "shape", "length")}

    assert shaping(found) == shaping(CONFIG)
    assert (found.run.name, found.data.train, found.cluster.workers) == ("mine", "train", 2)
