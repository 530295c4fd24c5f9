"""The configuration: what is refused and in which words, and that values survive every way in."""

import dataclasses
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from jebm.config import (
    Checkpoint,
    Cluster,
    Config,
    Data,
    EarlyStopping,
    Energy,
    Evaluation,
    Features,
    Generator,
    Hierarchy,
    Inference,
    Langevin,
    Likelihood,
    Model,
    Optimizer,
    Optimizers,
    Prior,
    Run,
    Train,
    config_to_dict,
    differing_keys,
    leaves,
    role_of,
)
from jebm.errors import ConfigError
from jebm.parser import (
    argument_parser,
    config_from_dict,
    config_to_yaml,
    load_config,
    override,
    parse_arguments,
)

ROOT = Path(__file__).resolve().parents[2]


def parse(*arguments: str) -> Config:
    return parse_arguments(argument_parser("a job"), arguments)[0]


def refusal(*arguments: str) -> str:
    """Return the message of the ConfigError that the command line meets: always one line."""
    with pytest.raises(ConfigError) as caught:
        parse(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str, name: str = "config.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# A config in which no value is the default, so that no round trip can pass by dropping one.
EVERYTHING = Config(
    run=Run("other-1", "s3://bucket/some prefix: #1", 7, False, True, "runs/other-0", ("mlflow", "wandb")),
    data=Data("data/a", "data/b", "data/c"),
    model=Model(64, 3, (1, 2, 3, 4)),
    likelihood=Likelihood("gaussian", 0.123456789012345678, "per_channel", 6),
    hierarchy=Hierarchy(30, 0.1, 0.4),
    inference=Inference((5, 6, 7), 8),
    generator=Generator((9, 10, 11, 12), 13, "concat"),
    prior=Prior("top"),
    energy=Energy(14, 3, spectral_norm=False, output_scale=4.5, activation="silu", penalty=0.25),
    langevin=Langevin(15, 0.35, "torch", "philox"),
    optimizer=Optimizers(
        Optimizer(1e-5, 0.1, 0.95, 5e-4, "cosine", 0.99, 10, 1.5),
        Optimizer(2e-6, 0.2, 0.96, 1e-4, "exponential", 0.97, 20, 2.5),
        Optimizer(3e-6, 0.3, 0.97, 2e-4, "cosine", 0.98, 30, 3.5),
    ),
    train=Train(
        1.5, 36, 3, "bf16", True, "joint", 0.5, 4, 0.999, 7, 70, EarlyStopping("evaluation/elbo", 3, 0.5)
    ),
    checkpoint=Checkpoint(11, 5, sharded=True),
    evaluation=Evaluation(7, Features(kind="effnetlite0"), "weights.pth", 500, 3),
    cluster=Cluster("process", 4, 2, 2, 1, "T4", max_failures=1, autoscales=True, hang_seconds=30),
)


def test_everything_differs_from_the_defaults():
    ours, defaults = (dict(leaves(config_to_dict(config))) for config in (EVERYTHING, Config()))
    assert ours.keys() == defaults.keys()
    same = [key for key in ours if ours[key] == defaults[key] and not key.endswith(".class_path")]
    # The other values exclude data.cache_gb, train.gaussian_share, likelihood.learn_std and own classes.
    assert same == ["data.cache_gb", "likelihood.kind", "train.regime"]


@pytest.mark.parametrize("config", [Config(), EVERYTHING], ids=["defaults", "everything"])
def test_values_survive_every_way_in(config, yaml_file):
    assert config_from_dict(config_to_dict(config)) == config
    path = yaml_file(config_to_yaml(config))
    assert load_config(path) == config
    assert parse("--config", path) == config
    # a sweep's sample: dotted keys on top of a file
    sample = dict(leaves(config_to_dict(config)))
    assert load_config(yaml_file("{}"), sample) == config


def test_the_dict_is_plain_data():
    values = config_to_dict(EVERYTHING)
    assert values == yaml.safe_load(yaml.safe_dump(values))
    assert values["model"]["latent_dims"] == [1, 2, 3, 4]


def test_the_later_value_wins(yaml_file):
    first = yaml_file("energy: {width: 1, depth: 3}\nlangevin: {steps: 9}\n", "a.yaml")
    second = yaml_file("energy: {width: 2}\n", "b.yaml")
    config = parse("--config", first, "--config", second, "--langevin.steps=5")
    assert (config.energy.width, config.energy.depth, config.langevin.steps) == (2, 3, 5)
    assert load_config(first, {"energy.width": 6}).energy == Energy(6, 3)


def test_override_changes_dotted_keys_and_checks_them_together():
    changes = {"model.latent_dims": "[3, 4]", "inference.channels": [8], "generator.channels": (8,)}
    changed = override(EVERYTHING, {**changes, "generator.join": "add", "optimizer.energy.lr": "1e-4"})
    assert changed.model.latent_dims == (3, 4)  # text for a list is read as YAML
    assert changed.optimizer.energy.lr == 1e-4
    assert (changed.langevin, changed.run) == (EVERYTHING.langevin, EVERYTHING.run)
    with pytest.raises(ConfigError, match=r"^inference\.channels: has 3 numbers, but 2 latent layers"):
        override(EVERYTHING, {"model.latent_dims": [3, 4]})
    with pytest.raises(ConfigError, match=r"^unknown key energy\.widht; did you mean energy\.width\?"):
        override(Config(), {"energy.widht": 3})


def test_a_single_latent_layer_has_trunks_of_any_length_that_the_image_allows():
    single = {"model.latent_dims": [10], "inference.channels": [8], "generator.channels": [4, 8, 16]}
    for join in ("add", "concat"):
        assert override(Config(), {**single, "generator.join": join}).generator.channels == (4, 8, 16)
    with pytest.raises(ConfigError, match=r"^model\.image_size: the channels of a trunk halve the image 5 "):
        override(Config(), {**single, "generator.channels": [4] * 5})


@pytest.mark.parametrize(
    ("argument", "key", "meant"),
    [
        ("--energy.widht=50", "energy.widht", "energy.width"),
        ("--langevin.stepsize=0.3", "langevin.stepsize", "langevin.step_size"),
        ("--enrgy.width=50", "enrgy.width", "energy.width"),
        ("--optimizer.energy.lrr=1", "optimizer.energy.lrr", "optimizer.energy.lr"),
        ("--batch_size=64", "batch_size", "train.batch_size"),
        ("--latent_dims=[2]", "latent_dims", "model.latent_dims"),
        ("--lr=1", "lr", "optimizer.generator.lr or optimizer.energy.lr or optimizer.likelihood.lr"),
        ("--energy.w=3", "energy.w", "energy.width"),  # no abbreviations: a new key would change them
    ],
)
def test_an_unknown_key_is_named_with_a_suggestion(argument, key, meant, yaml_file):
    expected = f"unknown key {key}; did you mean {meant}?"
    assert refusal(argument) == expected
    name, value = argument[2:].split("=")
    if "." in name:
        section, _, leaf = name.rpartition(".")
        text = f"{leaf}: {value}"
        for part in reversed(section.split(".")):
            text = f"{part}: {{{text}}}"
        path = yaml_file(text)
        assert refusal("--config", path) == f"{path}: {expected}"
        with pytest.raises(ConfigError) as caught:
            config_from_dict(yaml.safe_load(text))
        assert str(caught.value) == expected


def test_a_key_like_no_other_is_pointed_to_the_help():
    assert refusal("--nonsense=1") == "unknown key nonsense; see --help for all keys"
    assert "stray" in refusal("stray")


@pytest.mark.parametrize(
    ("key", "value", "needs"),
    [
        ("energy.width", "fifty", "an integer, not 'fifty'"),
        ("energy.width", "2.5", "an integer, not 2.5"),
        ("energy.width", "1e2", "an integer, not 100.0"),
        ("energy.width", "true", "an integer, not true"),
        ("energy.width", "[1]", "an integer, not [1]"),
        ("energy.width", "{a: 1}", 'an integer, not {"a": 1}'),
        ("energy.width", "9" * 5000, "an integer, not "),
        ("langevin.step_size", "fast", "a number, not 'fast'"),
        ("langevin.step_size", ".nan", "a number, not NaN"),
        ("optimizer.energy.lr", "-.inf", "a number, not -Infinity"),
        ("energy.spectral_norm", "maybe", "true or false, not 'maybe'"),
        ("energy.spectral_norm", "1", "true or false, not 1"),
        ("model.latent_dims", "2", "a list: [2], not 2"),
        ("model.latent_dims", "2,2,10", "a list: [2,2,10], not '2,2,10'"),
        ("model.latent_dims", "(2, 2, 10)", "a list: [2,2,10], not '(2, 2, 10)'"),
        ("model.latent_dims", "wide", "a list, such as [2,10], not 'wide'"),
        ("data.train", "[1, 2]", "text, not [1, 2]"),
        ("run.init_from", "[1, 2]", "text, not [1, 2]"),
        ("cluster.min_workers", "few", "an integer, not 'few'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_in_plain_words(key, value, needs, yaml_file):
    section, leaf = key.rsplit(".", 1)
    nested = f"{leaf}: {value}"
    for part in reversed(section.split(".")):
        nested = f"{part}: {{{nested}}}" if not value.startswith(("2,", "(")) else f"{part}:\n {nested}"
    path = yaml_file(nested)
    if not key.startswith(("data.", "run.")):  # any word of the command line is text
        assert refusal(f"--{key}={value}").startswith(f"{key}: needs {needs}")
        assert refusal(f"--{key}", value).startswith(f"{key}: needs {needs}")
    assert refusal("--config", path).startswith(f"{path}: {key}: needs {needs}")


def test_an_item_of_the_wrong_type_is_named():
    assert refusal("--model.latent_dims=[2, x]") == "model.latent_dims[1]: needs an integer, not 'x'"


@pytest.mark.parametrize(("key", "value"), [("generator.join", "multiply"), ("train.precision", "fp16")])
def test_one_of_a_few_words_is_asked_for_by_all_of_them(key, value):
    assert re.match(rf"{key}: must be one of \w+(, \w+)+, not '{value}'", refusal(f"--{key}={value}"))
    assert refusal("--train.precision=bf61").endswith("; did you mean bf16?")


def test_a_switch_needs_no_value():
    config = parse(
        "--checkpoint.sharded", "--run.deterministic", "--energy.spectral_norm", "no", "--run.accept_changes"
    )
    assert (config.checkpoint.sharded, config.run.deterministic, config.run.accept_changes) == (True,) * 3
    assert not config.energy.spectral_norm
    assert refusal("--checkpoint.sharded", "2") == "checkpoint.sharded: needs true or false, not 2"


def test_a_gpu_is_shared_by_single_workers_only():
    for gpus in (0, 0.25, 1):
        assert Cluster(gpus_per_worker=gpus).gpus_per_worker == gpus
    for gpus in (-1, 0.001, 1.5, 2, math.nan):
        with pytest.raises(ConfigError, match=r"^cluster.gpus_per_worker: must be 0, 1, or a share of one"):
            Cluster(gpus_per_worker=gpus)
    assert refusal("--cluster.workers=2", "--cluster.gpus_per_worker=0.5") == (
        "cluster.gpus_per_worker: 0.5 needs cluster.workers 1, not 2: the workers of a group cannot share "
        "one; set it to 1"
    )
    assert refusal("--cluster.accelerator=T4").startswith("cluster.accelerator: names a kind of GPU, and ")


def test_the_gpu_switch_that_is_no_more_is_still_read():
    for words in (["--cluster.gpu"], ["--cluster.gpu", "true"], ["--cluster.gpu=true"]):
        assert parse(*words).cluster == Cluster(gpus_per_worker=1)
    assert parse("--cluster.gpu=false").cluster == Cluster()
    assert config_from_dict({"cluster": {"gpu": True}}).cluster.gpus_per_worker == 1


@pytest.mark.parametrize("key", ["energy.width", "run.storage", "model.latent_dims", "config"])
def test_an_option_without_a_value_is_named(key):
    assert refusal(f"--{key}") == refusal(f"--{key}", "--energy.depth=2") == f"--{key}: needs a value"


def test_odd_but_good_values_are_read():
    values = {
        "run": {"name": "no", "seed": "010"},
        "energy": {"width": "1_00"},
        "energy.spectral_norm": "off",
    }
    config = config_from_dict(values)
    assert (config.run.name, config.run.seed) == ("no", 10)
    assert (config.energy.width, config.energy.spectral_norm) == (100, False)
    assert parse("--train.epochs", "1e-1", "--energy", "{depth: 3}", "--run.name=null").energy.depth == 3


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("energy: {width: }", "energy.width"),
        ("energy: {spectral_norm: null}", "energy.spectral_norm"),
        ("train: {precision: }", "train.precision"),
        ("optimizer: {energy: {lr: null}}", "optimizer.energy.lr"),
        ("energy: null\nlangevin: {steps: 3}", "energy"),
        ("energy: 3", "energy"),
        ("optimizer: {energy: 3}", "optimizer.energy"),
        ("optimizer: {energy: [1]}", "optimizer.energy"),
    ],
)
def test_a_key_without_a_value_is_refused_by_name(text, key, yaml_file):
    path = yaml_file(text)
    assert refusal("--config", path).startswith(f"{path}: {key}: needs ")


def test_null_is_a_value_where_it_means_none():
    config = config_from_dict({"data": {"held_out": None}, "optimizer": {"energy": {"clip_norm": None}}})
    assert config == Config()
    assert "energy.width" in refusal("--energy.width=null")


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"run.name": "a/b"}, "run.name"),
        ({"run.storage": ""}, "run.storage"),
        ({"run.seed": -1}, "run.seed"),
        ({"run.seed": 2**63}, "run.seed"),
        ({"model.image_channels": 2}, "model.image_channels"),
        ({"model.latent_dims": []}, "model.latent_dims"),
        ({"model.latent_dims": [2, 0, 2]}, "model.latent_dims"),
        ({"likelihood.std": 0}, "likelihood.std"),
        ({"inference.channels": [32, 0]}, "inference.channels"),
        ({"inference.channels": [32]}, "inference.channels"),
        ({"generator.channels": [32, 64, 64]}, "generator.channels"),
        ({"generator.join": "concat"}, "generator.channels"),
        ({"model.latent_dims": [2, 2, 2, 10]}, "inference.channels"),
        ({"model.image_size": 3}, "model.image_size"),
        ({"energy.width": -1}, "energy.width"),
        ({"energy.depth": 0}, "energy.depth"),
        ({"energy.output_scale": 0}, "energy.output_scale"),
        ({"langevin.steps": 0}, "langevin.steps"),
        ({"evaluation.features": "inceptionv3"}, "evaluation.inception_weights"),
        ({"langevin.step_size": 2}, "langevin.step_size"),
        ({"langevin.step_size": 0}, "langevin.step_size"),
        ({"optimizer.generator.lr": 0}, "optimizer.generator.lr"),
        ({"optimizer.energy.lr": -1e-3}, "optimizer.energy.lr"),
        ({"optimizer.energy.beta1": 1}, "optimizer.energy.beta1"),
        ({"optimizer.generator.clip_norm": 0}, "optimizer.generator.clip_norm"),
        ({"optimizer.energy.decay_per_epoch": 1.1}, "optimizer.energy.decay_per_epoch"),
        ({"train.epochs": 0}, "train.epochs"),
        ({"train.batch_size": 7, "cluster.workers": 8}, "train.batch_size"),
        ({"train.batch_size": 7, "cluster.workers": 2, "train.accumulate": 4}, "train.batch_size"),
        ({"train.ema_decay": 1}, "train.ema_decay"),
        ({"checkpoint.keep_last": 0}, "checkpoint.keep_last"),
        ({"cluster.workers": 0}, "cluster.workers"),
    ],
)
def test_values_that_cannot_work_are_refused_by_key(values, key):
    message = refusal(*(f"--{name}={value}" for name, value in values.items()))
    assert message.startswith(f"{key}: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_rate_is_infinite_or_not_a_number(value):
    with pytest.raises(ConfigError):
        Optimizers(energy=Optimizer(lr=value))
    with pytest.raises(ConfigError):
        Langevin(step_size=value)


def test_a_frozen_config_stays_as_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().energy.width = -1


def test_a_resume_may_change_where_and_how_long_but_not_what():
    config = Config()
    free = dataclasses.replace(
        config,
        run=Run("another", "s3://elsewhere/x", 0, deterministic=False, accept_changes=True),
        train=Train(epochs=9, compile=True, report_every_steps=1, pictures_every_steps=1),
        checkpoint=Checkpoint(1, 1),
        cluster=Cluster("process", 2, cpus_per_worker=3, gpus_per_worker=1, max_failures=0),
    )
    assert differing_keys(free, config_to_dict(config)) == []
    assert differing_keys(config, config_to_dict(config)) == []
    bound = dataclasses.replace(
        config,
        run=Run(seed=1),
        data=Data("elsewhere"),
        energy=Energy(50),
        optimizer=Optimizers(energy=Optimizer(lr=1e-4)),
        train=Train(batch_size=64),
    )
    expected = {"run.seed", "energy.width", "optimizer.energy.lr", "train.batch_size"}
    assert set(differing_keys(bound, config_to_dict(config))) == expected
    assert set(differing_keys(config, config_to_dict(bound))) == expected


def test_a_key_of_an_older_version_has_the_role_of_its_section():
    assert role_of("cluster.that_is_gone") == "where"
    assert role_of("energy.that_is_gone") == role_of("gone.altogether") == "result"


def test_a_key_that_only_the_other_config_has_differs():
    other = config_to_dict(Config())
    other["energy"]["temperature"] = 1.0
    assert differing_keys(Config(), other) == ["energy.temperature"]


def test_a_key_that_an_earlier_version_lacked_counts_as_its_default():
    other = config_to_dict(Config())
    del other["hierarchy"], other["likelihood"]["learn_std"]
    assert differing_keys(Config(), other) == []
    assert differing_keys(override(Config(), {"hierarchy.rate_factor": 30}), other) == [
        "hierarchy.rate_factor"
    ]


def test_a_key_by_its_earlier_name_is_the_present_one():
    earlier = config_to_dict(Config())
    del earlier["likelihood"]
    earlier["model"]["likelihood_std"] = 0.3
    assert config_from_dict(earlier) == override(Config(), {"likelihood.std": 0.3})
    assert parse("--model.likelihood_std", "0.3").likelihood.std == 0.3
    assert differing_keys(Config(), earlier) == ["likelihood.std"]


def test_one_optimizers_key_leaves_the_others_defaults():
    rate = Config().optimizer.likelihood.lr
    assert config_from_dict({"optimizer.energy.lr": 1e-5}).optimizer.likelihood.lr == rate
    assert parse("--optimizer.energy.lr", "1e-5").optimizer.likelihood.lr == rate


def test_help_says_what_every_key_means_and_which_step_size(capsys):
    with pytest.raises(SystemExit) as left:
        parse("--help")
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split()).partition("options:")[2]
    assert "--langevin.step_size" in text
    assert "s, the standard deviation of the noise of a step" in text
    for key, _ in leaves(config_to_dict(Config())):
        assert f"--{key}" in text, key
        name, *meaning = text.partition(f"--{key} ")[2].partition("(type")[0].split()
        assert 2 <= len(meaning) < 100, f"{key} is not explained: {name} {meaning}"


def test_print_config_prints_what_config_reads_back(capsys, yaml_file):
    parser = argument_parser("a job with an option of its own")
    parser.add_argument("--dry-run", action="store_true", help="no key")
    with pytest.raises(SystemExit):
        parse_arguments(parser, ["--energy.width=17", "--dry-run", "--print_config"])
    assert load_config(yaml_file(capsys.readouterr().out)) == Config(energy=Energy(17))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jobs" / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_shipped_configs_load(path):
    assert load_config(path) != Config()


def test_the_papers_configs_are_the_papers():
    """The table in docs/model.md, from the released code."""
    hierarchical = load_config(ROOT / "jobs" / "configs" / "svhn_hierarchical.yaml")
    fid = load_config(ROOT / "jobs" / "configs" / "svhn_fid.yaml")
    assert hierarchical.model.latent_dims == (2, 2, 2, 10)
    assert fid.model.latent_dims == (10,) * 5
    for config, factor, sampler, energy, join in [
        (hierarchical, 3, Langevin(60, 0.4), (50, 4), "add"),
        (fid, 10, Langevin(100, 0.3), (100, 2), "concat"),
    ]:
        assert 1 / (2 * config.likelihood.std**2) == pytest.approx(factor, rel=1e-6)
        assert config.langevin == sampler
        assert (config.energy.width, config.energy.depth) == energy
        assert config.generator.join == join
        assert config.train.batch_size == 100
        assert (config.optimizer.generator.lr, config.optimizer.energy.lr) == (3e-4, 2e-6)
        assert (config.optimizer.generator.weight_decay, config.optimizer.energy.weight_decay) == (5e-4, 0)


def run_without(forbidden: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process where the given packages cannot be imported."""
    hook = f"""
    import sys
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {forbidden!r}:
                raise ModuleNotFoundError(f"{{name}} is not installed here")
    sys.meta_path.insert(0, Refuse())
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(hook) + textwrap.dedent(code)],
        env={"PYTHONPATH": str(ROOT / "platform")},
        capture_output=True,
        text=True,
        check=False,
    )


HEAVY = {"ray", "jsonargparse", "yaml", "boto3", "botocore", "pyarrow", "tensorboard", "PIL", "scipy"}


def test_the_model_runs_with_torch_and_the_standard_library_alone():
    answer = run_without(
        HEAVY,
        """
        import pkgutil, torch
        import jebm.config, jebm.core
        for module in pkgutil.iter_modules(jebm.core.__path__):
            __import__(f"jebm.core.{module.name}")
        from jebm.core.model import build_model
        from jebm.core.objective import Objective
        from jebm.core.prior import sample_prior
        from jebm.rng import gaussian_noise
        config = jebm.config.Config()
        model, noise = build_model(config), gaussian_noise(0, 0)
        z, _ = sample_prior(model, config.langevin, 2, noise(0, "chain"))
        Objective(model)(torch.zeros(2, 1, 28, 28), noise(0, "posterior")(2, 14), z).loss.backward()
        print("trained")
        """,
    )
    assert (answer.stdout, answer.returncode) == ("trained\n", 0), answer.stderr


def test_the_config_runs_with_the_standard_library_alone():
    answer = run_without(
        {*HEAVY, "torch", "numpy"}, "import jebm.config; print(jebm.config.Config().run.name)"
    )
    assert answer.stdout == "run\n", answer.stderr


def test_the_refusal_works():
    assert run_without(HEAVY, "import jebm.parser").returncode == 1
