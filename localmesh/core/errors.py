"""What can go wrong, as pure exceptions. localmesh.rpc.errors maps each to a gRPC status and an ErrorInfo.

MeshError
  InternalError
  InvalidRequest, InvalidSpec, ModelNotNamed
  ModelNotFound, NodeNotFound, ReplicaNotFound
  PromptTooLong, CapabilityUnsupported, MethodUnknown
  PlacementFailed: NoCapacity, SourceMissing, EngineUnavailable, NoNodes
  ModelLoading, LoadFailed, Overloaded
  ReplicaRefused: ReplicaFull, ReplicaStale, ReplicaDraining     (no work was done: always safe elsewhere)
  ReplicaLost, EngineFailed
  StoreUnavailable, Conflict, SchemaUnsupported, ComponentUnreachable
  NodePending, NodeNameTaken, NodeInUse, IncarnationLost, JoinTokenInvalid, Unauthenticated, PermissionDenied
  BackendNotFound, BackendExists, BackendInUse, BackendInvalid, BackendInstallFailed

The message is one or two sentences for a person: what happened, and what to do. Everything in it that varies is in
`metadata`, too.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar


class MeshError(Exception):
    """A failure with a reason that programs can read.

    Args:
        message: What happened and what to do, for a person.
        retry_after_seconds: When the same call is worth another try, if that can be told.
        metadata: The values of the reason's metadata keys, as documented at localmesh.v1.ErrorReason.
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, retry_after_seconds: float | None = None, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_seconds = retry_after_seconds
        self.metadata: Mapping[str, str] = MappingProxyType({k: str(v) for k, v in metadata.items()})


class InternalError(MeshError):
    """A fault of localmesh itself."""


class InvalidRequest(MeshError):
    """A field of a request is not acceptable."""

    reason = "INVALID_REQUEST"


class InvalidSpec(MeshError):
    """A model's spec or policy is not acceptable."""

    reason = "INVALID_SPEC"


class ModelNotNamed(MeshError):
    """The call does not say which model it is for."""

    reason = "MODEL_NOT_NAMED"


class ModelNotFound(MeshError):
    """No such model."""

    reason = "MODEL_NOT_FOUND"


class NodeNotFound(MeshError):
    """No such node."""

    reason = "NODE_NOT_FOUND"


class ReplicaNotFound(MeshError):
    """No such replica."""

    reason = "REPLICA_NOT_FOUND"


class PromptTooLong(MeshError):
    """The prompt has more tokens than the context."""

    reason = "PROMPT_TOO_LONG"


class CapabilityUnsupported(MeshError):
    """The model's engine cannot do this."""

    reason = "CAPABILITY_UNSUPPORTED"


class MethodUnknown(MeshError):
    """Nobody serves the method."""

    reason = "METHOD_UNKNOWN"


class PlacementFailed(MeshError):
    """A model cannot be placed."""


class NoCapacity(PlacementFailed):
    """No node has room."""

    reason = "NO_CAPACITY"


class SourceMissing(PlacementFailed):
    """No node has the model's file."""

    reason = "SOURCE_MISSING"


class EngineUnavailable(PlacementFailed):
    """No node can run the engine."""

    reason = "ENGINE_UNAVAILABLE"


class NoNodes(PlacementFailed):
    """There is no live node."""

    reason = "NO_NODES"


class ModelLoading(MeshError):
    """The model is still loading; the caller was held as long as it may be."""

    reason = "MODEL_LOADING"


class LoadFailed(MeshError):
    """The model could not be loaded."""

    reason = "LOAD_FAILED"


class Overloaded(MeshError):
    """Every replica is at its limit."""

    reason = "OVERLOADED"


class ReplicaRefused(MeshError):
    """A replica refused before any work was done: another one may be asked."""


class ReplicaFull(ReplicaRefused):
    """The replica is at its limit."""

    reason = "REPLICA_FULL"


class ReplicaStale(ReplicaRefused):
    """The call was meant for another replica or revision."""

    reason = "REPLICA_STALE"


class ReplicaDraining(ReplicaRefused):
    """The replica stops."""

    reason = "REPLICA_DRAINING"


class ReplicaLost(MeshError):
    """The replica was lost while it answered."""

    reason = "REPLICA_LOST"


class EngineFailed(MeshError):
    """The engine failed at this request."""

    reason = "ENGINE_FAILED"


class StoreUnavailable(MeshError):
    """Etcd does not answer."""

    reason = "STORE_UNAVAILABLE"


class Conflict(MeshError):
    """What a transaction compared has changed meanwhile."""

    reason = "CONFLICT"


class SchemaUnsupported(MeshError):
    """The store was written by a version that this one does not understand."""

    reason = "SCHEMA_UNSUPPORTED"


class ComponentUnreachable(MeshError):
    """A registry or router does not answer."""

    reason = "COMPONENT_UNREACHABLE"


class NodePending(MeshError):
    """The node waits for approval."""

    reason = "NODE_PENDING"


class NodeNameTaken(MeshError):
    """The node's name belongs to another key."""

    reason = "NODE_NAME_TAKEN"


class NodeInUse(MeshError):
    """The node has replicas."""

    reason = "NODE_IN_USE"


class IncarnationLost(MeshError):
    """The registration has ended."""

    reason = "INCARNATION_LOST"


class JoinTokenInvalid(MeshError):
    """The join token is wrong or has expired."""

    reason = "JOIN_TOKEN_INVALID"


class Unauthenticated(MeshError):
    """The caller showed no identity."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(MeshError):
    """The caller's identity may not do this."""

    reason = "PERMISSION_DENIED"


class BackendNotFound(MeshError):
    """The node has no such backend, or none that can be changed from here."""

    reason = "BACKEND_NOT_FOUND"


class BackendExists(MeshError):
    """The node has another backend of that name."""

    reason = "BACKEND_EXISTS"


class BackendInUse(MeshError):
    """Replicas run the backend."""

    reason = "BACKEND_IN_USE"


class BackendInvalid(MeshError):
    """What is to be installed is no backend, is damaged, or is not safe to unpack."""

    reason = "BACKEND_INVALID"


class BackendInstallFailed(MeshError):
    """A backend could not be installed."""

    reason = "BACKEND_INSTALL_FAILED"
