"""MeshError to gRPC status and back. WIRE is the only table of it.

A status carries a google.rpc.Status in its trailers ("grpc-status-details-bin") with an ErrorInfo, whose reason is the
name of a localmesh.v1.ErrorReason without its prefix, and a RetryInfo where the error says when to try again.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from localmesh.core import errors as e
from localmesh.core.errors import MeshError
from localmesh.v1 import errors_pb2 as pb

DOMAIN: Final = "localmesh.dev"
DETAILS_KEY: Final = "grpc-status-details-bin"
PREFIX: Final = "ERROR_REASON_"

_C = grpc.StatusCode

WIRE: Final[Mapping[type[MeshError], tuple[Any, "pb.ErrorReason.ValueType"]]] = {
    e.InternalError: (_C.INTERNAL, pb.ERROR_REASON_INTERNAL),
    e.InvalidRequest: (_C.INVALID_ARGUMENT, pb.ERROR_REASON_INVALID_REQUEST),
    e.InvalidSpec: (_C.INVALID_ARGUMENT, pb.ERROR_REASON_INVALID_SPEC),
    e.ModelNotNamed: (_C.INVALID_ARGUMENT, pb.ERROR_REASON_MODEL_NOT_NAMED),
    e.ModelNotFound: (_C.NOT_FOUND, pb.ERROR_REASON_MODEL_NOT_FOUND),
    e.NodeNotFound: (_C.NOT_FOUND, pb.ERROR_REASON_NODE_NOT_FOUND),
    e.ReplicaNotFound: (_C.NOT_FOUND, pb.ERROR_REASON_REPLICA_NOT_FOUND),
    e.PromptTooLong: (_C.INVALID_ARGUMENT, pb.ERROR_REASON_PROMPT_TOO_LONG),
    e.CapabilityUnsupported: (_C.UNIMPLEMENTED, pb.ERROR_REASON_CAPABILITY_UNSUPPORTED),
    e.MethodUnknown: (_C.UNIMPLEMENTED, pb.ERROR_REASON_METHOD_UNKNOWN),
    e.NoCapacity: (_C.RESOURCE_EXHAUSTED, pb.ERROR_REASON_NO_CAPACITY),
    e.SourceMissing: (_C.FAILED_PRECONDITION, pb.ERROR_REASON_SOURCE_MISSING),
    e.EngineUnavailable: (_C.FAILED_PRECONDITION, pb.ERROR_REASON_ENGINE_UNAVAILABLE),
    e.NoNodes: (_C.UNAVAILABLE, pb.ERROR_REASON_NO_NODES),
    e.ModelLoading: (_C.UNAVAILABLE, pb.ERROR_REASON_MODEL_LOADING),
    e.LoadFailed: (_C.FAILED_PRECONDITION, pb.ERROR_REASON_LOAD_FAILED),
    e.Overloaded: (_C.RESOURCE_EXHAUSTED, pb.ERROR_REASON_OVERLOADED),
    e.ReplicaFull: (_C.RESOURCE_EXHAUSTED, pb.ERROR_REASON_REPLICA_FULL),
    e.ReplicaStale: (_C.UNAVAILABLE, pb.ERROR_REASON_REPLICA_STALE),
    e.ReplicaDraining: (_C.UNAVAILABLE, pb.ERROR_REASON_REPLICA_DRAINING),
    e.ReplicaLost: (_C.UNAVAILABLE, pb.ERROR_REASON_REPLICA_LOST),
    e.EngineFailed: (_C.INTERNAL, pb.ERROR_REASON_ENGINE_FAILED),
    e.StoreUnavailable: (_C.UNAVAILABLE, pb.ERROR_REASON_STORE_UNAVAILABLE),
    e.Conflict: (_C.ABORTED, pb.ERROR_REASON_CONFLICT),
    e.SchemaUnsupported: (_C.FAILED_PRECONDITION, pb.ERROR_REASON_SCHEMA_UNSUPPORTED),
    e.ComponentUnreachable: (_C.UNAVAILABLE, pb.ERROR_REASON_COMPONENT_UNREACHABLE),
    e.NodePending: (_C.FAILED_PRECONDITION, pb.ERROR_REASON_NODE_PENDING),
    e.NodeNameTaken: (_C.ALREADY_EXISTS, pb.ERROR_REASON_NODE_NAME_TAKEN),
    e.NodeInUse: (_C.FAILED_PRECONDITION, pb.ERROR_REASON_NODE_IN_USE),
    e.IncarnationLost: (_C.FAILED_PRECONDITION, pb.ERROR_REASON_INCARNATION_LOST),
    e.JoinTokenInvalid: (_C.UNAUTHENTICATED, pb.ERROR_REASON_JOIN_TOKEN_INVALID),
    e.Unauthenticated: (_C.UNAUTHENTICATED, pb.ERROR_REASON_UNAUTHENTICATED),
    e.PermissionDenied: (_C.PERMISSION_DENIED, pb.ERROR_REASON_PERMISSION_DENIED),
    e.BackendNotFound: (_C.NOT_FOUND, pb.ERROR_REASON_BACKEND_NOT_FOUND),
    e.BackendExists: (_C.ALREADY_EXISTS, pb.ERROR_REASON_BACKEND_EXISTS),
    e.BackendInUse: (_C.FAILED_PRECONDITION, pb.ERROR_REASON_BACKEND_IN_USE),
    e.BackendInvalid: (_C.INVALID_ARGUMENT, pb.ERROR_REASON_BACKEND_INVALID),
    e.BackendInstallFailed: (_C.FAILED_PRECONDITION, pb.ERROR_REASON_BACKEND_INSTALL_FAILED),
}

_BY_REASON: Final[Mapping[str, type[MeshError]]] = {
    pb.ErrorReason.Name(reason).removeprefix(PREFIX): kind for kind, (_, reason) in WIRE.items()
}

# A status travels in HTTP/2 trailers, twice (grpc-message percent-encoded, details in base64), and gRPC's peers accept
# 8 KiB of them by default. An error that does not fit would be lost whole.
_MESSAGE_LIMIT: Final = 2600
_VALUE_LIMIT: Final = 200
_KEYS_LIMIT: Final = 8


def wire_of(kind: type[MeshError]) -> tuple[Any, "pb.ErrorReason.ValueType"]:
    """Return status code and reason of an error's class: its own row, else that of the nearest base, else INTERNAL."""
    for base in kind.__mro__:
        if base in WIRE:
            return WIRE[base]
    return WIRE[e.InternalError]


def to_status(error: MeshError) -> status_pb2.Status:
    """Return the error as a google.rpc.Status with ErrorInfo, and RetryInfo where the error has one.

    A text or value that is too long for trailers is cut, visibly.
    """
    code, reason = wire_of(type(error))
    status = status_pb2.Status(code=code.value[0], message=_cut(error.message, _MESSAGE_LIMIT))
    info = error_details_pb2.ErrorInfo(
        reason=pb.ErrorReason.Name(reason).removeprefix(PREFIX),
        domain=DOMAIN,
        metadata={k: _cut(v, _VALUE_LIMIT) for k, v in list(error.metadata.items())[:_KEYS_LIMIT]},
    )
    _pack(status, info)
    if error.retry_after_seconds is not None:
        delay = Duration()
        delay.FromMicroseconds(max(0, int(error.retry_after_seconds * 1e6)))
        _pack(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return status


async def abort_with(context: Any, error: MeshError) -> NoReturn:
    """End the call of a servicer's context with the error.

    Trailers that the servicer has set are kept.

    Raises:
        grpc.aio.AbortError: Always; it must not be swallowed.
    """
    status = to_status(error)
    kept = tuple((k, v) for k, v in context.trailing_metadata() or () if k != DETAILS_KEY)
    code, _ = wire_of(type(error))
    await context.abort(code, status.message, (*kept, (DETAILS_KEY, status.SerializeToString())))
    raise AssertionError("context.abort returned")


def from_rpc_error(error: Any, *, endpoint: str = "") -> MeshError:
    """Return the MeshError that a failed call stands for.

    The class, message, metadata and retry delay are those of the server's error. What gRPC itself, or a foreign server,
    reports becomes the nearest class with a message that says what to do.

    Args:
        error: What the call raised: a grpc.RpcError with code(), details() and trailing_metadata().
        endpoint: Who was called, for messages about a peer that cannot be reached.
    """
    return from_parts(error.code(), error.details() or "", error.trailing_metadata(), endpoint=endpoint)


def from_parts(
    code: Any, details: str, trailers: Iterable[tuple[str, str | bytes]] | None, *, endpoint: str = ""
) -> MeshError:
    """Return the MeshError that a status stands for; see from_rpc_error."""
    status = _status_of(trailers)
    restored = from_status(status) if status is not None else None
    return restored or _from_grpc(code, details, endpoint)


def from_status(status: status_pb2.Status) -> MeshError | None:
    """Return the MeshError in a google.rpc.Status, or None where it carries no reason of ours."""
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    kind: type[MeshError] | None = None
    metadata: dict[str, object] = {}
    retry_after: float | None = None
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
            kind = _BY_REASON.get(info.reason)
            metadata = dict(info.metadata)
        elif detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
            retry_after = retry.retry_delay.ToMicroseconds() / 1e6
    if kind is None:
        return None
    restored = kind(status.message, retry_after_seconds=retry_after)
    restored.metadata = {key: str(value) for key, value in metadata.items()}
    return restored


def reason_of(trailers: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Return the reason in a call's trailers, e.g. "REPLICA_FULL", or an empty string where there is none of ours."""
    status = _status_of(trailers)
    restored = from_status(status) if status is not None else None
    return restored.reason if restored is not None else ""


def has_reason(error: Any, *kinds: type[MeshError]) -> bool:
    """Whether a grpc.RpcError carries the reason of one of the given errors, or of a class derived from one."""
    status = _status_of(error.trailing_metadata())
    restored = from_status(status) if status is not None else None
    return isinstance(restored, kinds)


def _status_of(trailers: Iterable[tuple[str, str | bytes]] | None) -> status_pb2.Status | None:
    for key, value in trailers or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:  # a foreign server's bytes: as good as none
                return None
    return None


def _from_grpc(code: Any, text: str, endpoint: str) -> MeshError:
    who = f"{endpoint}: " if endpoint else ""
    if code is _C.RESOURCE_EXHAUSTED and "message larger than max" in text:
        return e.InvalidRequest(
            f"{who}a message is larger than this mesh allows ({text}). Send less at once, or raise max_message_bytes on"
            " every component and the client.",
            field="",
        )
    if code is _C.UNAVAILABLE:
        reason = tls_trouble(text)
        kind_of = TlsTrouble if reason else e.ComponentUnreachable
        return kind_of(f"{who}cannot be reached ({text}). {reason or 'Is it running?'}", endpoint=endpoint)
    if code is _C.DEADLINE_EXCEEDED:
        return CallTimedOut(f"{who}no answer within the call's deadline. It may be busy.", endpoint=endpoint)
    if code is _C.CANCELLED:
        return CallCancelled(f"{who}the call was cancelled ({text})")
    kind = {
        _C.UNIMPLEMENTED: e.MethodUnknown,
        _C.INVALID_ARGUMENT: e.InvalidRequest,
        _C.UNAUTHENTICATED: e.Unauthenticated,
        _C.PERMISSION_DENIED: e.PermissionDenied,
    }.get(code)
    if kind is not None:
        return kind(f"{who}{text}")
    return e.InternalError(f"{who}{code.name}: {text}")


_TLS_TROUBLES: Final = (
    ("certificate has expired", "The certificate shown there has expired: renew it there; it is read without restart."),
    ("certificate is not yet valid", "The certificate shown there is not valid yet: do the machines' clocks differ?"),
    (
        "Hostname Verification Check failed",
        "The certificate shown there is not for this address: call it by a name that the certificate carries.",
    ),
    ("WRONG_VERSION_NUMBER", "There is no TLS there: leave the certificates away, or turn TLS on there."),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "The certificate shown there was not signed by the given CA: is that the CA of this mesh?",
    ),
    ("certificate signature failure", "The certificate shown there was not signed by the given CA."),
    ("Handshake read failed", "It ends the TLS handshake: is there TLS at all, and does it accept the certificate?"),
    (
        "Socket closed",
        "It closes connections at once, as servers with TLS do to all who show no valid certificate of their CA.",
    ),
)
"""What gRPC says of a connection that failed, the more telling words first, and what is to be done."""


def tls_trouble(text: str) -> str:
    """Return what is wrong with certificates, from what gRPC says of a connection; empty where it is something else."""
    if "failed to connect" not in text:  # a connection that worked has ended
        return ""
    return next((sentence for words, sentence in _TLS_TROUBLES if words in text), "")


class ConfigError(e.InvalidRequest):
    """A component cannot start as it is configured."""


class ListenFailed(ConfigError):
    """A server's address cannot be listened on."""


class TlsTrouble(e.ComponentUnreachable):
    """A peer answers, but one side does not accept the other's certificate, or only one of the two speaks TLS."""


class CallTimedOut(e.ComponentUnreachable):
    """A call's deadline passed without an answer. The peer is busy, frozen or gone: this does not tell which."""


class CallCancelled(e.InternalError):
    """A call was cancelled, by this side or on the way."""


def _pack(status: status_pb2.Status, detail: Any) -> None:
    packed = AnyMessage()
    packed.Pack(detail)
    status.details.append(packed)


def _cut(text: str, limit: int) -> str:
    text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate must not cost us the whole error
    if _encoded_size(text) <= limit:
        return text
    start = text[:limit]
    keep = bisect_right(range(len(start) + 1), limit - 3, key=lambda n: _encoded_size(start[:n])) - 1
    return start[:keep] + "..."


def _encoded_size(text: str) -> int:
    """Return the size of the text as a grpc-message header: printable ASCII but "%" stands for itself."""
    return sum(1 if " " <= c <= "~" and c != "%" else 3 * len(c.encode()) for c in text)
