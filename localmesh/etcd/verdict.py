"""What a failed call means: pure decisions on gRPC's status and etcd's words.

The question that matters is whether a write may have been applied. etcd answers UNAVAILABLE both before and
after it has proposed a change, so that only a few sentences are proof that nothing was written.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import grpc

from localmesh.etcd.errors import (
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


class Action(enum.Enum):
    """What to do after a failed try."""

    TRY_ELSEWHERE = "try the next endpoint"
    REAUTHENTICATE = "get a new token, then try again"
    GIVE_UP = "raise the error"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`error` is what to raise, now or when the deadline has come."""

    action: Action
    error: EtcdError


# gRPC's or etcd's words for "this was not carried out": the request did not leave us, or was refused on arrival.
_NOT_CARRIED_OUT = (
    "failed to connect to all addresses",
    "DNS resolution failed",
    "Name resolution failure",
    "etcdserver: no leader",
    "etcdserver: rpc not supported for learner",
    "etcdserver: server is not capable",
)
_TOKEN_IS_STALE = (
    "etcdserver: invalid auth token",
    "etcdserver: revision of auth store is old",
)
_TRANSPORT_FAILED = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DATA_LOSS,
)


def judge(code: grpc.StatusCode, details: str, *, may_repeat: bool, has_user: bool, lease_id: int = 0) -> Verdict:
    """Judge one failed try of a call. `may_repeat`: applying the call twice is the same as once."""
    if any(sentence in details for sentence in _TOKEN_IS_STALE):
        return Verdict(Action.REAUTHENTICATE, AuthenticationFailed(details))
    if "etcdserver: user name is empty" in details:
        # Authentication was switched on while we were connected without a token.
        action = Action.REAUTHENTICATE if has_user else Action.GIVE_UP
        return Verdict(action, AuthenticationFailed("etcd asks for a user and a password"))
    if code in _TRANSPORT_FAILED:
        return _transport_failed(code, details, may_repeat)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and details.startswith("CLIENT:") and not may_repeat:
        # The answer was too large for us to receive: the write itself went through.
        return Verdict(Action.GIVE_UP, UnknownOutcome(f"the answer could not be received: {details}"))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "too many requests" in details:
        return Verdict(Action.TRY_ELSEWHERE, RequestRefused(code.name, details))
    return Verdict(Action.GIVE_UP, _refused(code, details, lease_id))


def _transport_failed(code: grpc.StatusCode, details: str, may_repeat: bool) -> Verdict:
    if any(sentence in details for sentence in _NOT_CARRIED_OUT):
        return Verdict(Action.TRY_ELSEWHERE, ConnectionFailedError(details))
    if not may_repeat:
        sentence = f"etcd's answer to a write never came: {details} ({code.name})"
        return Verdict(Action.GIVE_UP, UnknownOutcome(sentence))
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Verdict(Action.TRY_ELSEWHERE, ConnectionTimeoutError("etcd did not answer in time"))
    return Verdict(Action.TRY_ELSEWHERE, ConnectionFailedError(f"{details} ({code.name})"))


def _refused(code: grpc.StatusCode, details: str, lease_id: int) -> EtcdError:
    if "requested lease not found" in details:
        return LeaseExpired(lease_id)
    if "has been compacted" in details:
        return RevisionCompactedError()
    if code is grpc.StatusCode.UNAUTHENTICATED or "authentication failed" in details:
        return AuthenticationFailed(details)
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return PermissionDenied(code.name, details)
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return PreconditionFailedError(code.name, details)
    return RequestRefused(code.name, details)


def knows_safe_progress(version: str) -> bool:
    """Return whether a progress report that we ask for cannot overtake events on this version of etcd.

    It can before 3.4.25 and 3.5.8 (etcd issue 15220); then only unasked reports are believed.
    """
    parsed = parse_version(version)
    if parsed is None:
        return False
    return parsed >= (3, 5, 8) or (3, 4, 25) <= parsed < (3, 5, 0)


def parse_version(text: str) -> tuple[int, int, int] | None:
    """Return (major, minor, patch) of `3.5.16` or `3.6.0-rc.1`; None where it is no version."""
    numbers = text.strip().removeprefix("v").split("-")[0].split("+")[0].split(".")
    if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
        return None
    major, minor, patch = (int(number) for number in numbers)
    return major, minor, patch
