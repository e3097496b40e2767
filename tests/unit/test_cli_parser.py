"""The command line as it is typed."""

import argparse

import pytest

from localmesh.app.config import OPTIONS
from localmesh.cli.arguments import given_settings, model_and_index
from localmesh.cli.parser import build_parser
from localmesh.core.errors import InvalidRequest

PARSER = build_parser()


def parse(*words: str) -> argparse.Namespace:
    return PARSER.parse_args(words)


def test_only_what_was_given_becomes_a_setting() -> None:
    assert given_settings(parse("router")) == {}
    assert given_settings(parse("router", "--listen", "h:1", "--insecure")) == {
        "router.listen": "h:1",
        "insecure": True,
    }


def test_up_takes_the_settings_of_every_component_with_their_sections() -> None:
    settings = given_settings(parse("up", "--workers", "2", "--router-listen", "h:1", "--worker-labels", "a=b"))
    assert settings == {"up.workers": "2", "router.listen": "h:1", "worker.labels": "a=b"}


def test_output_has_a_short_flag_everywhere_a_mesh_is_asked() -> None:
    for words in (["models"], ["nodes"], ["replicas"], ["status"], ["version"], ["generate", "m", "p"], ["embed", "m"]):
        assert given_settings(parse(*words, "-o", "json")) == {"client.output": "json"}


def test_every_option_can_be_given_to_the_command_that_reads_it() -> None:
    offered: set[str] = set()
    for command in ("up", "registry", "router", "worker", "models"):
        for action in _sub_parser(command)._actions:
            offered.add(action.dest.removeprefix("set:"))
    assert set(OPTIONS) <= offered


@pytest.mark.parametrize("words", [[], ["generate"], ["apply"], ["nonsense"], ["models", "--nonsense"]])
def test_wrong_usage_exits_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*words)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        *("up", "registry", "router", "worker", "apply", "delete", "models", "nodes", "replicas"),
        *("generate", "chat", "embed", "tokenize", "status", "logs", "demo", "version", "backends"),
    ],
)
def test_every_command_has_help_with_its_variables(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(command, "--help")
    assert stopped.value.code == 0
    assert "LOCALMESH_CONFIG" in capsys.readouterr().out


def _sub_parser(command: str) -> argparse.ArgumentParser:
    action = next(a for a in PARSER._actions if isinstance(a, argparse._SubParsersAction))
    found = action.choices[command]
    assert isinstance(found, argparse.ArgumentParser)
    return found


@pytest.mark.parametrize(
    ("text", "expected"), [("tiny", ("tiny", None)), ("tiny#0", ("tiny", 0)), ("a:b-c.d#12", ("a:b-c.d", 12))]
)
def test_a_model_and_one_index_of_it_are_told_apart(text: str, expected: tuple[str, int | None]) -> None:
    """F49, F50."""
    assert model_and_index(text) == expected


@pytest.mark.parametrize("text", ["tiny#", "tiny#x", "tiny#-1", "tiny#1#2", "tiny#²", "tiny#9999999999"])
def test_what_is_no_index_is_refused_and_never_read_as_all_replicas(text: str) -> None:
    """F49."""
    with pytest.raises(InvalidRequest):
        model_and_index(text)


def test_a_backend_comes_from_exactly_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    """F48."""
    found = parse("backend", "install", "echo", "--pip", "a==1", "--pip", "b", "--module", "a.serve", "--node", "n1")
    assert (found.name, found.pip, found.module, found.node) == ("echo", ["a==1", "b"], "a.serve", ["n1"])
    for words in ([], ["--dir", "/x", "--archive", "y"], ["--pip", "a", "--module", "m", "--script", "s"]):
        with pytest.raises(SystemExit):
            parse("backend", "install", "echo", *words)
    with pytest.raises(SystemExit):
        parse("backend", "delete", "echo", "--node", "n1", "--all-nodes")
    assert "usage:" in capsys.readouterr().err
