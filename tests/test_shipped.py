"""What comes with jebm is found from any folder; what lies in the folder itself comes first."""

from pathlib import Path

import pytest

from jebm.config import Config
from jebm.data.manifest import read_manifest
from jebm.parser import load_config
from jebm.paths import shipped
from jebm.store.storage import normalised_uri, open_store
from jebm.sweep.space import load_search

JOBS = Path(__file__).resolve().parents[1] / "jobs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_configs_searches_and_images_are_found_from_any_folder() -> None:
    smoke = load_config("smoke", {"evaluation.every_steps": 24})
    assert (
        load_config("smoke")
        == load_config("jobs/configs/smoke.yaml")
        == load_config(JOBS / "configs/smoke.yaml")
    )
    assert load_search("first", smoke).trials == load_search("jobs/searches/first.yaml", smoke).trials == 6
    assert read_manifest(open_store(Config().data.train)).images == 1600
    assert normalised_uri(Config().data.train) == str(JOBS / "data/fashion_mnist_2000/train")


def test_a_file_of_this_folder_comes_first_and_a_run_is_no_config(elsewhere: Path) -> None:
    (elsewhere / "smoke").mkdir()
    assert load_config("smoke").run.name == "smoke"
    (elsewhere / "first").write_text("run: {name: mine}")
    assert load_config("first").run.name == "mine"


@pytest.mark.parametrize("name", ["jobs", "jobs/data", "jobs/configs", "jobs/data/fashion_mnist_2000"])
def test_what_is_written_never_lies_in_the_installation(name: str, elsewhere: Path) -> None:
    assert open_store(name).uri == (elsewhere / name).as_uri()


@pytest.mark.parametrize("name", ["runs/mine", "jobs/none", "jobs/../setup.cfg", "/etc/none", "~", ""])
def test_any_other_path_stays_as_it_is(name: str) -> None:
    assert shipped(name) == shipped(name, "configs") == Path(name)
