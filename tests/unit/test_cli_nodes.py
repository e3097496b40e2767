"""How nodes are shown to people."""

from typing import Any

import pytest

from localmesh.cli import commands_nodes
from localmesh.cli.parser import build_parser
from localmesh.v1 import types_pb2 as types

GIB = 1 << 30


def node(**fields: Any) -> types.Node:
    device = types.Device(
        id="cpu", kind="cpu", total_bytes=10 * GIB, budget_bytes=8 * GIB, worker_budget_bytes=9 * GIB, claimed_bytes=GIB
    )
    return types.Node(name="n1", state=types.NODE_STATE_LIVE, devices=[device], max_replicas_per_model=1, **fields)


def test_what_holds_without_an_override_is_shown_plainly() -> None:
    """F30, F32."""
    plain = node()
    assert commands_nodes.slots_text(plain) == "1"
    assert commands_nodes.budget_text(plain, plain.devices[0]) == "8.0 GiB"


def test_an_override_is_shown_with_how_it_came_about() -> None:
    """F30, F32: whose word it is, of what, and what the worker says."""
    overrides = types.NodeOverrides(max_replicas_per_model=3, memory_budgets={"*": "80%"})
    shown = node(overrides=overrides, worker_max_replicas_per_model=1)
    assert commands_nodes.slots_text(shown) == "3 (worker: 1)"
    assert commands_nodes.budget_text(shown, shown.devices[0]) == "8.0 GiB (80% of 10.0 GiB; worker: 9.0 GiB)"
    assert commands_nodes.slots_text(types.Node(overrides=overrides)) == "3 (override)"
    own = types.NodeOverrides(memory_budgets={"*": "80%", "cpu": "8GiB"})
    assert "8GiB of" in commands_nodes.budget_text(node(overrides=own), shown.devices[0])


@pytest.mark.parametrize(
    ("state", "flags", "text"),
    [
        ("NODE_STATE_LIVE", {}, "live"),
        ("NODE_STATE_CORDONED", {"cordoned": True}, "cordoned"),
        ("NODE_STATE_DRAINING", {"cordoned": True, "draining": True}, "draining, cordoned"),
        ("NODE_STATE_GONE", {"cordoned": True}, "gone, cordoned"),
        ("NODE_STATE_PENDING", {}, "pending"),
    ],
)
def test_a_state_is_told_with_what_an_operator_said_besides(state: str, flags: dict[str, bool], text: str) -> None:
    """F2."""
    assert commands_nodes.state_text(types.Node(state=types.NodeState.Value(state), **flags)) == text


def test_labels_and_keys_are_shown_where_there_is_room() -> None:
    """F6."""
    labelled = node(labels={"b": "2", "a": "1"}, key_fingerprint="f" * 64)
    assert "a=1,b=2" not in commands_nodes.node_table([labelled])
    wide = commands_nodes.node_table([labelled], wide=True)
    assert "a=1,b=2" in wide
    assert "f" * 16 in wide


@pytest.mark.parametrize(
    "words",
    [
        ["node", "approve", "a", "b", "--key", "00"],
        ["node", "remove", "a", "--force"],
        ["node", "label", "a", "x=y", "z-"],
        ["node", "override", "a", "--memory-budget", "80%", "--memory-budget", "GPU-1=2GiB"],
        ["node", "override", "a", "--reset", "all"],
        ["nodes", "-w", "-o", "json"],
    ],
)
def test_the_words_of_an_operator_are_understood(words: list[str]) -> None:
    assert build_parser().parse_args(words).client is True


@pytest.mark.parametrize("words", [["node"], ["node", "approve"], ["node", "drain"], ["node", "label", "a"]])
def test_words_without_an_object_are_not(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(words)
    assert "usage: localmesh" in capsys.readouterr().err
