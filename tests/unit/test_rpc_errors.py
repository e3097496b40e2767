"""Errors on the wire: the table, and the way there and back."""

import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from localmesh.core import errors as core
from localmesh.core.errors import MeshError
from localmesh.rpc import errors
from localmesh.v1 import errors_pb2 as pb

PROTO = Path(__file__).parents[2] / "protos" / "localmesh" / "v1" / "errors.proto"


def leaves(kind: type[MeshError]) -> list[type[MeshError]]:
    below = [k for k in kind.__subclasses__() if k.__module__ == core.__name__]
    return [leaf for k in below for leaf in leaves(k)] or [kind]


class Failed:
    """Looks like a grpc.RpcError."""

    def __init__(self, code: Any, details: str, trailers: tuple[tuple[str, str | bytes], ...] = ()) -> None:
        self._parts = (code, details, trailers)

    def code(self) -> Any:
        return self._parts[0]

    def details(self) -> str:
        return self._parts[1]

    def trailing_metadata(self) -> Any:
        return self._parts[2]


def sent(error: MeshError) -> Failed:
    status = errors.to_status(error)
    code, _ = errors.wire_of(type(error))
    return Failed(code, status.message, ((errors.DETAILS_KEY, status.SerializeToString()),))


def test_every_error_has_exactly_one_row_and_every_reason_is_used_exactly_once() -> None:
    assert set(leaves(MeshError)) == set(errors.WIRE)
    used = [reason for _, reason in errors.WIRE.values()]
    assert len(used) == len(set(used))
    assert set(used) == set(pb.ErrorReason.values()) - {pb.ERROR_REASON_UNSPECIFIED}


def test_the_reason_of_a_class_is_the_name_of_its_row() -> None:
    for kind, (_, reason) in errors.WIRE.items():
        assert pb.ErrorReason.Name(reason) == f"ERROR_REASON_{kind.reason}"


def test_each_row_has_the_status_that_the_protocol_documents() -> None:
    documented = {}
    comment: list[str] = []
    for line in PROTO.read_text().splitlines():
        line = line.strip()
        if line.startswith("//"):
            comment.append(line.removeprefix("//").strip())
        elif match := re.match(r"(ERROR_REASON_\w+) = \d+;", line):
            status = re.search(r"Status: ([A-Z_]+)\.", " ".join(comment))
            documented[match[1]] = status and status[1]
            comment = []
        else:
            comment = []
    assert len(documented) > 30
    for code, reason in errors.WIRE.values():
        assert documented[pb.ErrorReason.Name(reason)] == code.name


@pytest.mark.parametrize("kind", list(errors.WIRE), ids=lambda k: k.__name__)
def test_an_error_comes_back_as_it_was_sent(kind: type[MeshError]) -> None:
    error = kind("what happened; what to do", retry_after_seconds=1.25, model="m", replica="m/n/0")
    back = errors.from_rpc_error(sent(error))
    assert type(back) is kind
    assert back.message == error.message
    assert back.metadata == {"model": "m", "replica": "m/n/0"}
    assert back.retry_after_seconds == 1.25


def test_an_error_without_retry_comes_back_without() -> None:
    assert errors.from_rpc_error(sent(core.ModelNotFound("no"))).retry_after_seconds is None


def test_a_class_without_a_row_is_sent_as_its_nearest_base() -> None:
    class Narrower(core.NoCapacity):
        pass

    assert type(errors.from_rpc_error(sent(Narrower("no room")))) is core.NoCapacity
    assert type(errors.from_rpc_error(sent(core.PlacementFailed("no")))) is core.InternalError


def test_the_details_are_what_other_languages_expect() -> None:
    status = errors.to_status(core.ReplicaFull("full", retry_after_seconds=0.5, replica="m/n/0", limit=4))
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.code == 8
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("REPLICA_FULL", "localmesh.dev")
    assert info.metadata == {"replica": "m/n/0", "limit": "4"}
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 500


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=9000), st.dictionaries(st.sampled_from("abcdefghijkl"), st.text(max_size=2000)))
def test_no_error_outgrows_the_trailers_that_peers_accept(text: str, values: dict[str, str]) -> None:
    error = core.NoCapacity(text, **{f"k{k}": v for k, v in values.items()})
    status = errors.to_status(error)
    headers = errors._encoded_size(status.message) + len(status.SerializeToString()) * 4 / 3
    assert headers < 8000
    if errors._encoded_size(text.encode("utf-8", "replace").decode()) <= 2600:
        assert status.message == text.encode("utf-8", "replace").decode()
    else:
        assert status.message.endswith("...")


@pytest.mark.parametrize(
    ("code", "text", "kind", "says"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses", core.ComponentUnreachable, "Is it running"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", errors.CallTimedOut, "deadline"),
        ("CANCELLED", "Locally cancelled", errors.CallCancelled, "cancelled"),
        ("UNIMPLEMENTED", "Method not found!", core.MethodUnknown, "Method not found"),
        (
            "RESOURCE_EXHAUSTED",
            "SERVER: Received message larger than max (9 vs. 4)",
            core.InvalidRequest,
            "max_message",
        ),
        ("RESOURCE_EXHAUSTED", "quota", core.InternalError, "RESOURCE_EXHAUSTED: quota"),
        ("INVALID_ARGUMENT", "bad", core.InvalidRequest, "bad"),
        ("UNAUTHENTICATED", "who?", core.Unauthenticated, "who?"),
        ("PERMISSION_DENIED", "no", core.PermissionDenied, "no"),
        ("DATA_LOSS", "gone", core.InternalError, "DATA_LOSS: gone"),
    ],
)
def test_what_grpc_itself_reports_becomes_the_nearest_error(
    code: str, text: str, kind: type[MeshError], says: str
) -> None:
    error = errors.from_rpc_error(Failed(grpc.StatusCode[code], text), endpoint="h:1")
    assert type(error) is kind
    assert says in error.message
    assert error.message.startswith("h:1: ")


def test_details_of_strangers_are_not_taken_for_ours() -> None:
    foreign = AnyMessage()
    foreign.Pack(error_details_pb2.ErrorInfo(reason="REPLICA_FULL", domain="example.com"))
    unknown = AnyMessage()
    unknown.Pack(error_details_pb2.ErrorInfo(reason="FROM_THE_FUTURE", domain=errors.DOMAIN))
    for raw in (
        b"\xff\xff not protobuf",
        status_pb2.Status(code=5, details=[foreign]).SerializeToString(),
        status_pb2.Status(code=5, details=[unknown]).SerializeToString(),
        status_pb2.Status(code=5, details=[AnyMessage(type_url="x/y", value=b"\xff")]).SerializeToString(),
    ):
        error = errors.from_rpc_error(Failed(grpc.StatusCode.NOT_FOUND, "text", ((errors.DETAILS_KEY, raw),)))
        assert type(error) is core.InternalError
        assert error.message == "NOT_FOUND: text"


def test_reasons_can_be_asked_for() -> None:
    refused = sent(core.ReplicaStale("stale"))
    assert errors.has_reason(refused, core.ReplicaStale)
    assert errors.has_reason(refused, core.ReplicaRefused)
    assert not errors.has_reason(refused, core.ReplicaFull)
    assert not errors.has_reason(Failed(grpc.StatusCode.UNAVAILABLE, "x"), core.MeshError)
    assert errors.reason_of(refused.trailing_metadata()) == "REPLICA_STALE"
    assert errors.reason_of(()) == ""
