"""What a command line ends with."""

import json
import sys

import pytest

from localmesh import __version__
from localmesh.cli import main


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("LOCALMESH_STATE_DIR", str(tmp_path))


def test_the_version_is_printed_for_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"localmesh {__version__}\n"
    assert main(["version", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"version": __version__}


@pytest.mark.parametrize("command", ["up", "registry", "router", "worker", "demo"])
def test_components_refuse_to_run_on_other_systems(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main([command]) == 2
    assert "on Linux only, and this is darwin" in capsys.readouterr().err


def test_a_setting_that_cannot_be_used_is_one_sentence_and_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--timeout-seconds", "soon"]) == 2
    assert capsys.readouterr().err.startswith("localmesh: client.timeout_seconds = 'soon' (from flag")


def test_a_fault_of_our_own_is_a_sentence_and_with_debug_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localmesh.cli.commands_run.__version__", None)
    monkeypatch.setattr("localmesh.cli.output.write_line", lambda _: 1 / 0)
    assert main(["version"]) == 1
    said = capsys.readouterr().err
    assert "a fault of localmesh: ZeroDivisionError" in said
    assert "--debug" in said
    assert "Traceback" not in said
    assert main(["version", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
