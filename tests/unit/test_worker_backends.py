"""What is decided about backends and lines without touching a file: orders, stops, where lines end."""

from pathlib import Path

import pytest

from localmesh.core.errors import BackendInvalid, InvalidRequest
from localmesh.core.ids import CPU, ModelName, NodeName, ReplicaId
from localmesh.core.records import EngineInfo, ModelSpec, ReplicaState
from localmesh.core.replica_process import ReadyEvent
from localmesh.worker.backends import ArchiveSource, DirectorySource, Order
from localmesh.worker.engines import with_process_engines
from localmesh.worker.events import (
    Exited,
    Outcome,
    Registered,
    Report,
    Said,
    Spawned,
    Stop,
    StopAsked,
    Wanted,
    WantedArrived,
)
from localmesh.worker.logs import LINE_BYTES, whole_lines
from localmesh.worker.machine import Machine, MachineConfig
from localmesh.worker.pip_install import PipRequest

SHA = "0" * 64


def test_a_change_of_its_backend_ends_a_replica_without_blame_and_no_other() -> None:
    """F48, F49: exactly those that are named are stopped."""
    machine, spec = Machine(MachineConfig()), ModelSpec(name=ModelName("m"), backend="process:echo", source="")
    first, second = (ReplicaId(ModelName("m"), NodeName("n1"), index) for index in range(2))
    machine.handle(Registered(incarnation=1), now=0.0)
    both = tuple(
        Wanted(id=i, state=ReplicaState.PLACED, revision="r", spec=spec, devices={CPU: 1}, placement=3)
        for i in (first, second)
    )
    machine.handle(WantedArrived(incarnation=1, store_revision=5, replicas=both), now=0.0)
    for replica in (first, second):
        machine.handle(Spawned(id=replica, pid=7), now=0.0)
        machine.handle(Said(id=replica, event=ReadyEvent(endpoint="h:1", limit=1, memory_bytes=1)), now=0.0)
    asked = StopAsked(ids=frozenset({first}), message="its backend echo is upgraded")
    assert machine.handle(asked, now=0.0) == (Stop(id=first, drain=True),)
    assert machine.handle(asked, now=0.0) == ()
    assert Report(id=first) in machine.handle(Exited(id=first, returncode=0), now=0.0)
    report = machine.report(first, now=0.0)
    assert report is not None
    assert report.observed == Outcome(message="its backend echo is upgraded")
    machine.validate()


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a/b", "a b", "x" * 64, "-rf", "a\n"])
def test_a_backend_s_name_can_be_nothing_but_a_name(name: str) -> None:
    """F48."""
    with pytest.raises(InvalidRequest):
        Order(name=name, source=DirectorySource(path=Path("/x")), upgrade=False).check()


@pytest.mark.parametrize(
    "source",
    [
        DirectorySource(path=Path("relative")),
        ArchiveSource(path=Path("relative"), sha256=SHA),
        ArchiveSource(path=None, sha256="abc", uploaded=True),
        ArchiveSource(path=None, sha256=SHA + "0", uploaded=True),
    ],
)
def test_a_source_is_named_completely(source: DirectorySource | ArchiveSource) -> None:
    """F48."""
    with pytest.raises(InvalidRequest):
        Order(name="echo", source=source, upgrade=False).check()


@pytest.mark.parametrize(
    "request_",
    [
        PipRequest(requirements=(), module="m"),
        PipRequest(requirements=("a",)),
        PipRequest(requirements=("a",), module="m", script="s"),
        PipRequest(requirements=("--index-url=http://evil",), module="m"),
        PipRequest(requirements=("a", " -r/etc/passwd"), module="m"),
        PipRequest(requirements=("a\nb",), module="m"),
        PipRequest(requirements=("a",), module="m; rm -rf"),
        PipRequest(requirements=("a",), script="../../bin/sh"),
    ],
)
def test_pip_is_asked_for_packages_and_nothing_else(request_: PipRequest) -> None:
    """F48."""
    with pytest.raises(BackendInvalid):
        Order(name="echo", source=request_, upgrade=False).check()


def test_orders_for_the_same_are_equal_wherever_their_upload_lies() -> None:
    """F48: that is what makes two requests share one install."""

    def order(path: str, sha256: str = SHA, *, upgrade: bool = False) -> Order:
        return Order(name="echo", source=ArchiveSource(path=Path(path), sha256=sha256, uploaded=True), upgrade=upgrade)

    assert order("/a") == order("/b")
    assert hash(order("/a")) == hash(order("/b"))
    assert order("/a") != order("/a", "1" * 64)
    assert order("/a") != order("/a", upgrade=True)
    one, other = (PipRequest(requirements=(r,), module="m") for r in ("a==1", "a==2"))
    assert one.sha256 != other.sha256


def test_foreign_engines_are_replaced_and_the_others_stay() -> None:
    """F48."""
    llama, old, new = (EngineInfo(name=n, available=True) for n in ("llama", "process:old", "process:new"))
    assert with_process_engines((llama, old), (new,)) == (llama, new)


@pytest.mark.parametrize(
    ("data", "final", "expected"),
    [
        (b"", True, (0, 0)),
        (b"a\nb\nc", False, (2, 4)),
        (b"c", False, (0, 0)),
        (b"c", True, (1, 1)),
        (b"x" * LINE_BYTES, False, (1, LINE_BYTES)),
        (b"\n" + b"x" * (LINE_BYTES - 1), False, (1, 1)),
    ],
)
def test_where_lines_end_does_not_depend_on_when_they_are_looked_at(
    data: bytes, *, final: bool, expected: tuple[int, int]
) -> None:
    """F50."""
    assert whole_lines(data, final=final) == expected
