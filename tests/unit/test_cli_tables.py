"""Text for people."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmesh.cli import tables
from localmesh.cli.progress import ProgressLine, describe
from localmesh.cli.tables import Column
from localmesh.v1 import types_pb2 as pb


def test_columns_are_aligned_and_numbers_to_the_right() -> None:
    text = tables.render([Column("NAME"), Column("SIZE", right=True)], [["a", "5"], ["long-name", "12345"]])
    assert text.splitlines() == ["NAME        SIZE", "a              5", "long-name  12345"]


def test_an_empty_cell_is_a_dash_and_no_line_ends_in_space() -> None:
    text = tables.render([Column("A"), Column("B"), Column("C")], [["", "xxxxx", "y"]])
    assert text.splitlines() == ["A  B      C", "-  xxxxx  y"]


def test_control_characters_of_names_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in tables.render([Column("A")], [["\x1b[2Jx"]])


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2757440, "2.6 MiB"),
        (139 << 30, "139 GiB"),
        (5 << 40, "5.0 TiB"),
    ],
)
def test_sizes_are_human(count: int, text: str) -> None:
    assert tables.size(count) == text


@given(st.integers(0, 2**60))
def test_a_size_is_never_wide(count: int) -> None:
    assert len(tables.size(count)) <= 8


@pytest.mark.parametrize(("value", "text"), [(0.42, "0.4 s"), (12.4, "12 s"), (200.0, "3 min 20 s")])
def test_times_are_human(value: float, text: str) -> None:
    assert tables.seconds(value) == text


def test_progress_tells_model_node_phase_share_and_time_left() -> None:
    replica = pb.Replica(
        ref=pb.ReplicaRef(model="m", node="n"),
        state=pb.REPLICA_STATE_LOADING,
        progress=pb.LoadProgress(phase="loading", done_bytes=1 << 20, total_bytes=4 << 20),
    )
    replica.progress.eta.FromSeconds(3)
    assert describe(replica) == "loading m on n: loading 25 % of 4.0 MiB, about 3.0 s left"


def test_progress_without_numbers_tells_the_state() -> None:
    replica = pb.Replica(ref=pb.ReplicaRef(model="m", node="n"), state=pb.REPLICA_STATE_PLACED)
    assert describe(replica) == "loading m on n: placed"


def test_progress_before_there_is_a_replica() -> None:
    assert describe(pb.Replica()) == "finding a node"


def test_progress_into_a_file_is_a_line_for_each_change() -> None:
    out = io.StringIO()
    with ProgressLine(out) as line:
        line.show("a")
        line.show("a")
        line.show("b")
    assert out.getvalue() == "a\nb\n"
