"""What the command's exit codes mean. This table is the documentation: `localmesh --help` prints it."""

from collections.abc import Mapping
from enum import IntEnum, unique
from types import MappingProxyType

from localmesh.core import errors as e
from localmesh.core.errors import MeshError
from localmesh.rpc.errors import ConfigError, ListenFailed


@unique
class Exit(IntEnum):
    """Exit codes."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    INVALID = 5
    NOT_NOW = 6
    CANNOT = 7
    NOT_ALLOWED = 8
    INTERRUPTED = 130
    BROKEN_PIPE = 141


MEANING: Mapping[Exit, str] = MappingProxyType(
    {
        Exit.OK: "done",
        Exit.FAILURE: "a fault of localmesh or of an engine",
        Exit.USAGE: "wrong arguments or configuration",
        Exit.UNREACHABLE: "router, registry or etcd cannot be reached",
        Exit.NOT_FOUND: "no such model, node, replica or backend",
        Exit.INVALID: "the input is not acceptable: a manifest, a prompt",
        Exit.NOT_NOW: "not now: no capacity, overloaded, still loading; worth another try later",
        Exit.CANNOT: "not as things are: file or engine missing, port taken, load failed, not what the model can do",
        Exit.NOT_ALLOWED: "not allowed: certificate, approval or join token",
        Exit.INTERRUPTED: "interrupted by Ctrl-C",
        Exit.BROKEN_PIPE: "the reader of the output went away",
    }
)

# The first row whose class the error is an instance of counts.
_ROWS: tuple[tuple[tuple[type[MeshError], ...], Exit], ...] = (
    ((ListenFailed,), Exit.CANNOT),
    ((ConfigError,), Exit.USAGE),
    ((e.ComponentUnreachable, e.StoreUnavailable), Exit.UNREACHABLE),
    ((e.ModelNotFound, e.NodeNotFound, e.ReplicaNotFound, e.BackendNotFound), Exit.NOT_FOUND),
    ((e.InvalidRequest, e.InvalidSpec, e.ModelNotNamed, e.PromptTooLong, e.BackendInvalid), Exit.INVALID),
    ((e.NoCapacity, e.NoNodes, e.Overloaded, e.ModelLoading, e.ReplicaRefused, e.ReplicaLost), Exit.NOT_NOW),
    ((e.Conflict, e.IncarnationLost), Exit.NOT_NOW),
    ((e.SourceMissing, e.EngineUnavailable, e.LoadFailed, e.CapabilityUnsupported, e.MethodUnknown), Exit.CANNOT),
    ((e.SchemaUnsupported, e.NodeInUse, e.BackendExists, e.BackendInUse, e.BackendInstallFailed), Exit.CANNOT),
    ((e.Unauthenticated, e.PermissionDenied, e.JoinTokenInvalid, e.NodePending, e.NodeNameTaken), Exit.NOT_ALLOWED),
)


def exit_for(error: MeshError) -> Exit:
    """Return the exit code of a failure."""
    for kinds, code in _ROWS:
        if isinstance(error, kinds):
            return code
    return Exit.FAILURE
