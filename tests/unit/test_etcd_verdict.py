"""What a failed call means, and above all whether a write may have been applied."""

import grpc
import pytest

from localmesh.etcd import (
    AuthenticationFailed,
    ConnectionFailedError,
    ConnectionTimeoutError,
    EtcdError,
    LeaseExpired,
    PermissionDenied,
    PreconditionFailedError,
    RequestRefused,
    RevisionCompactedError,
    UnknownOutcome,
)
from localmesh.etcd.binary import is_durable
from localmesh.etcd.verdict import Action, judge, knows_safe_progress, parse_version

Code = grpc.StatusCode
TRANSPORT_CODES = (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.CANCELLED, Code.UNKNOWN, Code.INTERNAL)


@pytest.mark.parametrize("code", TRANSPORT_CODES)
@pytest.mark.parametrize(
    "details",
    [
        "Socket closed",
        "Deadline Exceeded",
        "recvmsg:Connection reset by peer",
        "etcdserver: request timed out",
        "etcdserver: request timed out, possibly due to previous leader failure",
        "etcdserver: leader changed",
        "etcdserver: server stopped",
        "a sentence nobody has seen before",
        "",
    ],
)
def test_a_write_that_may_have_been_applied_is_never_tried_again(code: grpc.StatusCode, details: str) -> None:
    verdict = judge(code, details, may_repeat=False, has_user=False)
    assert verdict.action is Action.GIVE_UP
    assert isinstance(verdict.error, UnknownOutcome)


@pytest.mark.parametrize(
    "details",
    [
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused",
        "DNS resolution failed for etcd.example:2379",
        "etcdserver: no leader",
        "etcdserver: rpc not supported for learner",
    ],
)
def test_a_write_that_was_certainly_not_carried_out_goes_to_the_next_endpoint(details: str) -> None:
    verdict = judge(Code.UNAVAILABLE, details, may_repeat=False, has_user=False)
    assert verdict.action is Action.TRY_ELSEWHERE
    assert isinstance(verdict.error, ConnectionFailedError)


@pytest.mark.parametrize("code", TRANSPORT_CODES)
def test_what_may_be_repeated_goes_to_the_next_endpoint(code: grpc.StatusCode) -> None:
    verdict = judge(code, "Socket closed", may_repeat=True, has_user=False)
    assert verdict.action is Action.TRY_ELSEWHERE
    assert isinstance(verdict.error, ConnectionFailedError | ConnectionTimeoutError)
    assert not isinstance(verdict.error, UnknownOutcome)


@pytest.mark.parametrize("may_repeat", [True, False])
@pytest.mark.parametrize(
    ("code", "details", "error"),
    [
        (Code.NOT_FOUND, "etcdserver: requested lease not found", LeaseExpired),
        (Code.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted", RevisionCompactedError),
        (Code.FAILED_PRECONDITION, "etcdserver: lease already exists", PreconditionFailedError),
        (Code.PERMISSION_DENIED, "etcdserver: permission denied", PermissionDenied),
        (Code.INVALID_ARGUMENT, "etcdserver: authentication failed, invalid user ID or password", AuthenticationFailed),
        (Code.INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request", RequestRefused),
        (Code.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", RequestRefused),
        (Code.RESOURCE_EXHAUSTED, "grpc: received message larger than max (3 vs. 2)", RequestRefused),
        (Code.UNIMPLEMENTED, "unknown method", RequestRefused),
    ],
)
def test_what_etcd_refuses_is_not_tried_again(
    code: grpc.StatusCode, details: str, error: type[EtcdError], may_repeat: bool
) -> None:
    verdict = judge(code, details, may_repeat=may_repeat, has_user=False)
    assert verdict.action is Action.GIVE_UP
    assert type(verdict.error) is error


@pytest.mark.parametrize("may_repeat", [True, False])
@pytest.mark.parametrize(
    ("code", "details"),
    [
        (Code.UNAUTHENTICATED, "etcdserver: invalid auth token"),
        (Code.INVALID_ARGUMENT, "etcdserver: revision of auth store is old"),
        (Code.INVALID_ARGUMENT, "etcdserver: user name is empty"),
    ],
)
def test_a_refused_token_is_renewed_also_for_writes(code: grpc.StatusCode, details: str, may_repeat: bool) -> None:
    assert judge(code, details, may_repeat=may_repeat, has_user=True).action is Action.REAUTHENTICATE


def test_without_a_user_there_is_no_token_to_renew() -> None:
    verdict = judge(Code.INVALID_ARGUMENT, "etcdserver: user name is empty", may_repeat=True, has_user=False)
    assert verdict.action is Action.GIVE_UP
    assert isinstance(verdict.error, AuthenticationFailed)


def test_an_answer_that_is_too_large_for_us_leaves_a_write_in_doubt_and_refuses_a_read() -> None:
    details = "CLIENT: Received message larger than max (5 vs. 4)"
    write = judge(Code.RESOURCE_EXHAUSTED, details, may_repeat=False, has_user=False)
    read = judge(Code.RESOURCE_EXHAUSTED, details, may_repeat=True, has_user=False)
    assert isinstance(write.error, UnknownOutcome)
    assert isinstance(read.error, RequestRefused)


def test_an_overloaded_member_is_left_for_another() -> None:
    verdict = judge(Code.RESOURCE_EXHAUSTED, "etcdserver: too many requests", may_repeat=False, has_user=False)
    assert verdict.action is Action.TRY_ELSEWHERE


@pytest.mark.parametrize(
    ("version", "safe", "durable"),
    [
        ("3.6.16", True, True),
        ("3.6.0-rc.1", True, True),
        ("3.5.8", True, True),
        ("3.5.7", False, True),
        ("3.5.6", False, True),
        ("3.5.5", False, False),
        ("3.5.1", False, False),
        ("3.4.25", True, True),
        ("3.4.24", False, True),
        ("3.4.22", False, True),
        ("3.4.21", False, False),
        ("3.3.27", False, False),
        ("unknown: UNAVAILABLE", False, False),
        ("", False, False),
    ],
)
def test_versions_are_trusted_with_progress_and_with_data_from_their_fixes_on(
    version: str, safe: bool, durable: bool
) -> None:
    assert knows_safe_progress(version) is safe
    assert is_durable(version) is durable


def test_versions_are_parsed_strictly() -> None:
    assert parse_version("v3.5.16") == (3, 5, 16)
    assert parse_version("3.7.0-alpha.0+git") == (3, 7, 0)
    for text in ("3.5", "three", "3.5.x", "3.5.1.2"):
        assert parse_version(text) is None
