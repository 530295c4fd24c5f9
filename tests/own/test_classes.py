"""Classes of the user's own in a config: found, typed, searched, and refused where they are not trusted."""

import sys
from pathlib import Path
from typing import Any

import pytest

from jebm.classes import loaded
from jebm.config import Config, Energy, differing_keys
from jebm.core.by_class import named_modules, origins
from jebm.core.model import build_model
from jebm.core.parts import Energy as EnergyBase
from jebm.errors import ConfigError
from jebm.parser import (
    argument_parser,
    config_from_dict,
    config_to_yaml,
    load_config,
    override,
    parse_arguments,
    word_or_class,
)
from jebm.sweep.space import search_from_dict

SUM = {"energy.class_path": "mylab.SumEnergy"}


def parse(*words: str) -> Config:
    return parse_arguments(argument_parser("a job"), words)[0]


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def imported(folder: Path) -> bool:
    return (folder / "imported.txt").exists()


def test_a_class_and_its_arguments_come_from_files_and_the_command_line(mylab: Path) -> None:
    file = mylab / "mine.yaml"
    file.write_text(
        "energy:\n  init_args: {width: 3, slopes: [1, 2], name: 'true'}\n  class_path: mylab.SumEnergy\n"
    )
    config = parse("--config", str(file), "--energy.init_args.width", "7")
    assert config.energy == Energy(
        class_path="mylab.SumEnergy", init_args={"width": 7, "slopes": (1.0, 2.0), "name": "true"}
    )
    (mylab / "again.yaml").write_text(config_to_yaml(config))
    assert load_config("again.yaml") == config
    assert override(config, {"energy.init_args.width": 9}).energy.init_args["width"] == 9
    assert differing_keys(config, {"energy": {"class_path": "mylab.SumEnergy"}}) == [
        f"energy.init_args.{name}" for name in ("width", "slopes", "name")
    ]


def test_another_class_takes_the_keys_of_the_earlier_one_with_it(mylab: Path) -> None:
    file = mylab / "mine.yaml"
    file.write_text("energy: {width: 3}\ngenerator: {class_path: mylab.Flat, init_args: {width: 8}}\n")
    assert parse("--config", "mine.yaml", "--energy.class_path", "mylab.SumEnergy").energy.width == 100
    again = parse("--config", "mine.yaml", "--generator.class_path=null")
    assert again.generator == Config().generator
    assert "energy.width: is a key of jebm's own part" in refusal(
        "--energy.width", "3", "--energy.class_path", "mylab.SumEnergy"
    )
    assert "energy.init_args: belong to a class" in refusal("--energy.init_args.width", "3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--energy.init_args.widht 3",
            "energy.init_args.widht: SumEnergy has no such argument; did you mean width?",
        ),
        (
            "--energy.init_args.x 3",
            "energy.init_args.x: SumEnergy has no such argument; it takes width, slopes, name",
        ),
        ("--energy.init_args.width x", "energy.init_args.width: needs an integer, not 'x'"),
        ("--energy.init_args.width null", "energy.init_args.width: needs a value, not null"),
        ("--energy.init_args.slopes 3", "energy.init_args.slopes: needs a list: [3], not 3"),
        (
            "--energy.init_args 3",
            "energy.init_args: needs arguments below it, such as energy.init_args.width, not 3",
        ),
        ("--energy.init_args.width {a:\u00a01}", "energy.init_args.width: needs"),
        ("--generator.class_path mylab.Flat", "generator.init_args.width: is missing; Flat needs it"),
    ],
)
def test_an_argument_is_held_to_the_signature(mylab: Path, words: str, message: str) -> None:
    assert refusal("--energy.class_path", "mylab.SumEnergy", *words.split(" ")).startswith(message)


def test_the_help_of_a_class_shows_its_docstring_and_keys(mylab: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--energy.help", "mylab.SumEnergy")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "A sum over layers of a small net each." in shown
    assert "--energy.init_args.width  (int, default: 20)" in shown


def test_a_search_holds_its_values_to_the_signature(mylab: Path) -> None:
    base = override(Config(), SUM)
    goal = {"objective": {"metric": "loss", "direction": "minimize"}, "trials": 2}
    space = {"energy.init_args.slopes": ["choice", [[1, 2], [3]]], "energy.init_args.width": ["int", 2, 9]}
    search = search_from_dict({"space": space, **goal}, base)
    sample = {"energy.init_args.slopes": search.space["energy.init_args.slopes"].choices[0]}
    energy = build_model(override(base, sample), ["mylab"]).energy
    assert energy.slopes == (1.0, 2.0)
    with pytest.raises(ConfigError, match=r"energy.init_args.widht.*did you mean width"):
        search_from_dict({"space": {"energy.init_args.widht": ["int", 2, 9]}, **goal}, base)
    with pytest.raises(ConfigError, match=r"energy.init_args.width: needs an integer"):
        search_from_dict({"space": {"energy.init_args.width": ["uniform", 2, 9]}, **goal}, base)


def test_nothing_is_imported_that_is_not_trusted(mylab: Path) -> None:
    stored = {"energy": {"class_path": "mylab.SumEnergy", "init_args": {"width": 3}}}
    config = config_from_dict(stored)
    with pytest.raises(ConfigError, match=r"energy.class_path: mylab.SumEnergy .* add --trust mylab$"):
        build_model(config)
    with pytest.raises(ConfigError, match=r"add --trust mylab$"):
        build_model(config, ["mylab2", "lab", "my"])
    assert not imported(mylab)
    assert "mylab" not in sys.modules
    model = build_model(config, named_modules(config))
    assert imported(mylab)
    assert [tuple(net[0].weight.shape) for net in model.energy.nets] == [(3, 2), (3, 2), (3, 10)]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("os.system", "is no class"),
        ("builtins.exec", "is no class"),
        ("subprocess.Popen", "does not derive from jebm.core.parts.Energy"),
        ("builtins.eval", "is no class"),
        ("jebm.cli._Lines", "is private"),
        ("jebm.native.chain", "chain"),
        ("jebm.__main__.main", "is private"),
        ("jebm.core.parts._Frozen", "is private"),
        ("jebm.core.parts.Energy", "lacks forward"),
        ("jebm.core.energy.nn.Linear", "there is no module jebm.core.energy.nn"),
        ("mylab.SumEnergy.__init__.__globals__", "is private"),
        ("mylab.SumEnergy.forward", "there is no module mylab.SumEnergy"),
        ("mylab.make", "is no class"),
        ("mylab.Stranger", "does not derive from jebm.core.parts.Energy"),
        ("mylab.Unfinished", "lacks forward"),
        ("mylab.nn", "is no class"),
        ("mylab.SumEnergi", "did you mean SumEnergy"),
        ("mylab2.SumEnergy", "there is no module mylab2"),
        ("../mylab.SumEnergy", "must be a path"),
        ("mylab.SumEnergy()", "must be a path"),
        ("x" * 300, "must be a path"),
        ("SumEnergy", "no installed package brings SumEnergy"),
        ("mylab.Broken", "Broken cannot be built: RuntimeError: no luck ("),
    ],
)
def test_what_is_no_energy_is_refused_in_one_line(mylab: Path, path: str, message: str) -> None:
    trusted = ["mylab", "mylab2", "os", "builtins", "subprocess"]
    with pytest.raises(ConfigError) as caught:
        build_model(config_from_dict({"energy.class_path": path}), trusted)
    text = str(caught.value)
    assert message in text
    assert text.startswith("energy.")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nonesuch_module\n", "ModuleNotFoundError: No module named 'nonesuch_module'"),
        ("1 / 0\n", "ZeroDivisionError: division by zero ("),
        ("class X(:\n", "SyntaxError"),
    ],
)
def test_a_module_that_fails_is_named_with_the_place(mylab: Path, source: str, message: str) -> None:
    (mylab / "other_lab.py").write_text(source)
    with pytest.raises(ConfigError, match=r"energy.class_path: other_lab cannot be imported") as caught:
        loaded("other_lab.X", EnergyBase, ["other_lab"], "energy.class_path")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_package_brings_short_names(mylab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = mylab / "site"
    info = installed / "mylab-1.2.dist-info"
    info.mkdir(parents=True)
    (mylab / "mylab.py").rename(installed / "mylab.py")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mylab\nVersion: 1.2\n")
    (info / "top_level.txt").write_text("mylab\n")
    (info / "entry_points.txt").write_text("[jebm.parts]\nsum = mylab:SumEnergy\n")
    monkeypatch.syspath_prepend(str(installed))
    config = config_from_dict({"energy.class_path": "sum"})
    with pytest.raises(ConfigError, match=r"add --trust mylab$"):
        build_model(config)
    assert named_modules(config) == ("mylab",)
    assert type(build_model(config, ["mylab"]).energy).__name__ == "SumEnergy"
    facts = origins(config, ["mylab"])
    assert facts["energy.class"] == "mylab.SumEnergy"
    assert facts["energy.package"] == "mylab 1.2"
    assert len(facts["energy.source_sha256"]) == 64
    assert "short names: sum)" in refusal("--energy.class_path", "sume")
    assert word_or_class("sum", "format", ("auto",)) == {"class_path": "sum"}
    assert word_or_class("sum", "format", ("auto", "sum")) == "sum"  # ours win


def test_jebms_own_parts_do_not_change_beside_a_class(mylab: Path) -> None:
    plain, mine = build_model(Config()), build_model(override(Config(), SUM), ["mylab"])
    for name, tensor in mine.inference.state_dict().items():
        assert tensor.equal(plain.inference.state_dict()[name])
    for name, tensor in mine.generator.state_dict().items():
        assert tensor.equal(plain.generator.state_dict()[name])
