"""What names a storage: URIs, paths, what people type in their place."""

import multiprocessing
import os
import pwd
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from jebm.data.dataset import default_cache_directory
from jebm.errors import JebmError, StoreError
from jebm.store.storage import LocalStore, S3Store, normalised_uri, open_store

ROOT_HOME = pwd.getpwuid(0).pw_dir


@pytest.mark.parametrize(
    ("uri", "same"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        (" S3://Bucket ", "s3://Bucket"),
        ("memory://name/a/", "memory://name/a"),
        ("file:///a/b%20c", "/a/b c"),
        ("file:/a/b", "/a/b"),
        ("file://localhost/a", "/a"),
        ("~", "/home/me"),
        ("~/runs", "/home/me/runs"),
        ("~root/runs", f"{ROOT_HOME}/runs"),
        ("runs/a", "runs/a"),
        ("runs:2/a", "runs:2/a"),
        ("runs/~", "runs/~"),
        ("./~runs", "./~runs"),
        ("./s3:/a", "./s3:/a"),
        ("s3", "s3"),
    ],
)
def test_a_uri_has_one_form_that_names_the_same_place(monkeypatch, uri, same):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    assert normalised_uri(uri) == same
    assert normalised_uri(same) == same
    first, second = open_store(uri), open_store(same)
    assert first.uri == second.uri
    assert isinstance(first, S3Store) == same.startswith("s3:")
    if isinstance(first, LocalStore):
        assert first.folder == Path(same).resolve()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("s3:/bucket/runs", "write s3://bucket/runs"),
        ("s3:bucket/runs", "write s3://bucket/runs"),
        ("s3//bucket/runs", "write s3://bucket/runs"),
        ("s3:///bucket/runs", "write s3://bucket/runs"),
        ("S3:/bucket", "write s3://bucket"),
        ("s3a://bucket/runs", "write s3://bucket/runs"),
        ("gs://bucket/runs", "write s3://bucket/runs and set AWS_ENDPOINT_URL=https://storage.googleapis"),
        ("az://container/runs", "no backend for Azure"),
        ("abfss://container@account.dfs.core.windows.net/runs", "no backend for Azure"),
        ("http://host:9000/bucket/runs", "write s3://bucket/runs and set AWS_ENDPOINT_URL=http://host:9000"),
        ("arn:aws:s3:::bucket", "unknown scheme"),
        ("hdfs:/bucket", "unknown scheme"),
        ("://bucket", "unknown scheme"),
        ("s3://", "names no bucket"),
        ("s3://bucket/../other", "is not a key"),
        ("s3://bucket/x?endpoint_override=localhost", "no options in a URI"),
        ("file://host/path", "three slashes"),
        ("file:path", "three slashes"),
        ("~nobody-of-this-name/runs", "'nobody-of-this-name' has no home folder here; write the whole path"),
        ("a\0b", "NUL"),
    ],
)
def test_refuses_a_uri_in_one_line_that_says_what_to_write(tmp_path, monkeypatch, uri, message):
    monkeypatch.chdir(tmp_path)
    for use in (open_store, normalised_uri):
        with pytest.raises(StoreError) as caught:
            use(uri)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "uri", ["s3://KEY:SECRET@bucket/x", "s3:KEY:SECRET@bucket", "http://KEY:SECRET@host/x"]
)
def test_never_repeats_a_secret_of_a_uri(uri):
    with pytest.raises(StoreError) as caught:
        open_store(uri)
    assert "SECRET" not in str(caught.value)


def test_links_in_a_circle_and_names_too_long_are_no_folder(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    for name in ("a/runs", "n" * 300):
        with pytest.raises(StoreError):
            open_store(str(tmp_path / name)).probe()


# ── Who has no home ─────────────────────────────────────────────────────────────────────────────────────

NOBODY = 54321  # a user id without a passwd entry


@pytest.fixture
def common():
    """A folder that every user can write to; tmp_path lies in one that nobody else may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def ask(asked: Callable[[], object], **environment: str) -> str:
    """Return what a child process of a user whom nobody knows answers: a value or an error, as text."""
    if os.getuid() != 0:
        pytest.skip("only root can become a user whom nobody knows")
    fork = multiprocessing.get_context("fork")
    answer, ours = fork.Pipe(duplex=False)
    child = fork.Process(target=answer_as_nobody, args=(asked, environment, ours))
    child.start()
    ours.close()
    told: str = answer.recv()
    child.join(60)
    assert child.exitcode == 0
    return told


def answer_as_nobody(asked: Callable[[], object], environment: dict[str, str], answer: Connection) -> None:
    keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    os.environ.clear()
    os.environ.update(keep | environment)
    tempfile.tempdir = None  # as in a new process
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    try:
        answer.send(str(asked()))
    except JebmError as error:
        answer.send(f"{type(error).__name__} {error}")


def test_who_has_no_home_caches_in_a_private_folder_of_the_temporary_one(common):
    cache = default_cache_directory
    ours = common / f"jebm-{NOBODY}"
    assert ask(cache, TMPDIR=str(common)) == f"{ours}/data"
    assert (ours.stat().st_uid, ours.stat().st_mode & 0o777) == (NOBODY, 0o700)
    assert ask(cache, TMPDIR=str(common), HOME="/") == f"{ours}/data"
    assert ask(cache, TMPDIR=str(common), JEBM_CACHE="/elsewhere") == "/elsewhere"
    ours.rmdir()
    ours.symlink_to("/tmp")  # somebody else was here first
    refusal = ask(cache, TMPDIR=str(common))
    assert refusal.startswith("DataError no folder for a cache")
    assert f"{ours}: belongs to another user" in refusal
    assert refusal.endswith("set JEBM_CACHE to a folder that can be written")


def test_who_has_no_home_is_told_so_when_a_path_names_it():
    for name in ("~/runs", "~"):
        assert ask(partial(open_store, name)) == (
            f"StoreError {name}: user id {NOBODY} has no home folder; set HOME, or write the whole path"
        )
    assert ask(default_cache_directory, JEBM_CACHE="~/x").startswith("DataError JEBM_CACHE: ~/x: user id")


def test_what_may_not_be_looked_into_is_not_empty(common):
    """An empty listing would begin a run anew."""
    store = open_store(str(common))
    store.put("a/b", b"1")
    assert ask(lambda: list(open_store(str(common)).list())).startswith("[ObjectInfo")
    (common / "a").chmod(0o700)
    refusal = ask(lambda: list(open_store(str(common)).list()))
    assert refusal.startswith(f"AccessDeniedError {store.uri}/a: this user may not list here")
    assert ask(lambda: list(open_store(str(common)).folders())) == "['a']"
    common.chmod(0o700)
    for what in ("list", "folders"):
        answer = ask(lambda name=what: list(getattr(open_store(str(common)), name)()))
        assert answer.startswith(f"AccessDeniedError {store.uri}: this user may not list here")


def test_a_link_to_itself_is_refused_as_any_damage(tmp_path):
    (tmp_path / "run.json").symlink_to("run.json")
    with pytest.raises(StoreError, match=r"run\.json: cannot"):
        open_store(str(tmp_path)).get("run.json")
