"""Configuration files, and what is written down of a running mesh."""

import json
import os
import stat
from pathlib import Path

import pytest

from localmesh.app import config_reader, running
from localmesh.app.config_reader import ConfigError, read
from localmesh.app.running import RunningMesh

HOME = {"HOME": "/home/somebody"}


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_variable_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "mesh: by-file\nrouter: {hold_seconds: 5}\nworker:\n  labels: {zone: a}\n")
    tree = read({}, config_file=file, environment=HOME | {"LOCALMESH_ROUTER_HOLD_SECONDS": "7"}).config
    assert tree.mesh == "by-file"
    assert tree.router.hold_seconds == pytest.approx(7.0)
    assert tree.worker.labels == {"zone": "a"}


def test_the_file_can_be_named_by_a_variable(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "mesh: by-file")
    assert read({}, environment=HOME | {"LOCALMESH_CONFIG": file}).config.mesh == "by-file"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mehs: x", r"unknown setting 'mehs': did you mean 'mesh'\?"),
        ("router: {listn: x}", r"unknown setting router.listn: did you mean 'listen'\?"),
        ("router: 5", "'router' must hold settings"),
        ("- a", "must hold settings"),
        ("mesh: [", "is not YAML"),
        ("drain_seconds: soon", "expected a time"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        read({}, config_file=file, environment=HOME)
    assert file in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        read({}, config_file=str(tmp_path / "none.yaml"), environment=HOME)


def test_a_written_tree_reads_back_and_is_for_its_owner_only(tmp_path: Path) -> None:
    settings = {
        "worker.labels": "zone=a",
        "etcd.endpoints": "h:1",
        "state_dir": str(tmp_path),
        "worker.served_by": "off",
    }
    tree = read(settings, environment=HOME).config
    config_reader.write_file(tmp_path / "c.yaml", tree)
    assert stat.S_IMODE((tmp_path / "c.yaml").stat().st_mode) == 0o600
    assert read({}, config_file=str(tmp_path / "c.yaml"), environment={}).config == tree


def mesh_of(pid: int, started: float) -> RunningMesh:
    return RunningMesh(pid=pid, started=started, mesh="main", router="127.0.0.1:1", registry="127.0.0.1:2")


def test_a_command_finds_the_mesh_that_runs(tmp_path: Path) -> None:
    running.write(tmp_path, mesh_of(os.getpid(), running.process_started(os.getpid())))
    tree = read({"state_dir": str(tmp_path)}, environment=HOME, find_running=True).config
    assert (tree.client.router, tree.client.registry) == ("127.0.0.1:1", "127.0.0.1:2")
    named = read({"state_dir": str(tmp_path), "client.router": "other:1"}, environment=HOME, find_running=True).config
    assert named.client.router == "other:1"


def test_what_a_killed_mesh_left_is_not_believed(tmp_path: Path) -> None:
    running.write(tmp_path, mesh_of(os.getpid(), running.process_started(os.getpid()) - 1))
    assert running.find(tmp_path) is None
    running.remove(tmp_path)
    running.remove(tmp_path)
    assert running.find(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{", json.dumps({"pid": 1})])
def test_a_damaged_note_is_no_mesh(tmp_path: Path, text: str) -> None:
    write(tmp_path / "up.json", text)
    assert running.find(tmp_path) is None
