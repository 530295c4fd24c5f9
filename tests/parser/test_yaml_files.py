"""Files of settings: what is refused by file and line, and odd but good ones that are read."""

import os
import re
import threading
from pathlib import Path

import pytest

from jebm.config import Config, Optimizer
from jebm.errors import ConfigError
from jebm.parser import argument_parser, load_config, parse_arguments
from jebm.parser.yaml_file import read_yaml
from jebm.sweep.space import load_search

ROOT = Path(__file__).resolve().parents[2]


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "file.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusals(path: Path) -> str:
    """Return the one line that both ways in have for a file: as a config, and as a search."""
    lines = []
    for read in (load_config, lambda path: load_search(path, Config())):
        with pytest.raises(ConfigError) as refused:
            read(path)
        lines.append(str(refused.value))
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"{path}: ")
    assert len(lines[0]) < 300
    assert lines[0].isprintable()
    return lines[0]


LAUGHS = "a0: &a0 [ha, ha, ha]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("train: {epochs: 1}\n\ntrain:\n  epochs: 2\n", r"train: stands twice \(line 1 and line 3\)"),
        (
            "optimizer:\n  energy:\n    lr: 1\n    lr: 1\n",
            r"optimizer\.energy\.lr: stands twice \(line 3 and line 4\)",
        ),
        ("energy: {width: 1}\nenergy.width: 2\n", r"energy\.width: stands twice \(line 1 and line 2\)"),
        ("run: {name: a, 'name': b}", r"run\.name: stands twice \(line 1 and line 1\)"),
        ("- {a: 1, a: 2}", r"\[0\]\.a: stands twice"),
        ("{a: " * 20_000 + "1" + "}" * 20_000, r"line 1: more than 30 levels deep"),
        ("[" * 20_000, r"line 1: more than 30 levels deep"),
        (CHAIN, r"line \d+: more than 30 levels deep"),
        (LAUGHS, r"line \d+: more than 10,000 values"),
        ("train: &a {epochs: *a}", r"line 1: train\.epochs holds itself by an alias"),
        ("train: &a {<<: *a}", r"holds itself by an alias"),
        ("train: {<<: 3}", r"line 1: << needs an alias of a mapping"),
        ("train: *nowhere", r"line 1: invalid YAML"),
        ("run: !!python/name:os.system x", r"line 1: the tag !!python/name:os\.system is not read"),
        ("run: {name: !mine x}", r"line 1: the tag !mine is not read"),
        ("train: {epochs: !!set {a}}", r"the tag !!set is not read"),
        ("? [1, 2]\n: 3", r"line 1: a key must be a word"),
        ("energy: {width: [3}", r"line 1: invalid YAML"),
        ("energy:\n\twidth: 3", r"line 2: invalid YAML"),
        ("a: 1\n---\nb: 2", r"line 2: invalid YAML \(but found another document\)"),
        ("- 1", r"holds no keys"),
        ("just words", r"holds no keys"),
        ("a: b: c", r"line 1: invalid YAML"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"is no text in UTF-8"),
        (b"run: \0", r"holds the byte 0x00"),
        ("run: {name: a}".encode("utf-16"), r"is no text in UTF-8"),
        (b"#" * 2_000_000, r"is larger than 1 MB"),
    ],
)
def test_what_is_no_file_of_settings_is_refused_by_name_and_line(tmp_path, content, line):
    assert re.search(line, refusals(written(tmp_path, content)))


@pytest.mark.parametrize("path", ["README.md", "jobs/data", "nowhere.yaml", "LICENSE", "/dev/zero"])
def test_other_files_are_refused_by_name(path):
    refusals(ROOT / path)


def test_each_kind_of_file_is_told_from_the_other(tmp_path):
    search = ROOT / "jobs/searches/joint.yaml"
    with pytest.raises(ConfigError, match=rf"^{search}: that is a search file; .* as --search {search}$"):
        load_config(search)
    config = ROOT / "jobs/configs/smoke.yaml"
    with pytest.raises(ConfigError, match=rf"^{config}: that is a config; give it as --config {config}$"):
        load_search(config, Config())


def test_odd_but_good_files_are_read(tmp_path, monkeypatch):
    text = """
    # a byte order mark, Windows line ends, an anchor, a merge, dotted keys, a date for a name
    optimizer:
      generator: &adam {lr: 1e-3, beta1: .5}
      energy: {<<: *adam, lr: 1.e-4}
    energy.width: 1_000
    run: {name: 2024-01-01, seed: 010}
    """
    config = load_config(written(tmp_path, "\ufeff" + text.replace("\n", "\r\n")))
    assert config.optimizer.energy == Optimizer(1e-4, 0.5)
    assert (config.energy.width, config.run.name, config.run.seed) == (1000, "2024-01-01", 10)
    assert load_config(written(tmp_path, "")) == load_config(written(tmp_path, "# nothing\n")) == Config()
    assert read_yaml(written(tmp_path, "a: [1, -2.5, .5, 1e3, yes, true, ~, '3', .inf, 1:30]")) == {
        "a": [1, -2.5, 0.5, 1000.0, "yes", True, None, "3", float("inf"), "1:30"]
    }


def test_a_pipe_is_read(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("energy: {width: 3}",))
    writer.start()
    assert load_config(path).energy.width == 3
    writer.join()


def test_home_is_written_out_in_files_options_and_the_names_of_files(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    written(home, "run: {storage: ~/runs, init_from: ~/runs/a}\ndata: {train: ~/data, held_out: ~/held}\n")
    parser = argument_parser("")
    parser.add_argument("--search")
    config, options = parse_arguments(
        parser, ["--config=~/file.yaml", "--evaluation.inception_weights", "~/w", "--search=~/s.yaml"]
    )
    assert (config.run.storage, config.run.init_from) == (f"{home}/runs", f"{home}/runs/a")
    assert (config.data.train, config.data.held_out) == (f"{home}/data", f"{home}/held")
    assert (config.evaluation.inception_weights, options.search) == (f"{home}/w", f"{home}/s.yaml")
    with pytest.raises(
        ConfigError, match=r"run\.storage: ~nobody-here/runs: 'nobody-here' has no home folder"
    ):
        load_config(written(home, "run: {storage: ~nobody-here/runs}"))


def test_overrides_and_file_are_one_config_and_home_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "other.yaml").write_text("cluster: {workers: 3}")
    with pytest.raises(ConfigError, match=r"train\.batch_size"):  # 2 images for 3 workers
        load_config("~/other.yaml", {"train.batch_size": 2})
    config = load_config("~/other.yaml", {"train.batch_size": 129, "data": {"held_out": None}})
    assert (config.cluster.workers, config.train.batch_size, config.data.held_out) == (3, 129, None)
