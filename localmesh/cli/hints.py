"""What a person can do next after a failure; the error's own message says what happened."""

from collections.abc import Mapping
from types import MappingProxyType

from localmesh.core import errors as e
from localmesh.core.errors import MeshError
from localmesh.rpc.errors import TlsTrouble

_HINTS: Mapping[type[MeshError], str] = MappingProxyType(
    {
        e.ComponentUnreachable: "Start a mesh here with `localmesh up`, or name another with --router and --registry.",
        TlsTrouble: (
            "Where `localmesh up` runs, commands find their certificate by themselves. Elsewhere, copy the folder"
            " tls/operator-operator of its state folder, and name the files with --tls-cert, --tls-key and --tls-ca."
        ),
        e.ModelNotFound: "`localmesh models` lists those that there are; `localmesh apply -f FILE` declares one.",
        e.NodeNotFound: "`localmesh nodes` lists those that there are.",
        e.NodeInUse: "`localmesh node drain NODE` moves its replicas away; `--force` removes it as it is.",
        e.NodeNameTaken: "Give this machine another --name, or forget the other one: `localmesh node remove NODE`.",
        e.ReplicaNotFound: "`localmesh replicas` lists those that there are.",
        e.NoCapacity: "`localmesh nodes` shows what is free.",
        e.NoNodes: "Start a worker: `localmesh worker`.",
        e.ModelLoading: "The load goes on: try again, or watch it with `localmesh replicas`.",
        e.LoadFailed: "`localmesh logs MODEL` shows the engine's output.",
        e.SourceMissing: "Put the file there, or change `source` and apply the model again.",
        e.EngineUnavailable: "`localmesh nodes` says for each node what to install.",
        e.BackendNotFound: "`localmesh backends` lists those that there are.",
        e.BackendInUse: "Delete the models that use it, or say --force.",
        e.BackendExists: "`localmesh backends` shows it.",
        e.Overloaded: "Try again, or raise max_replicas or max_concurrent_requests.",
        e.Unauthenticated: "Name a certificate of this mesh with --tls-cert, --tls-key and --tls-ca.",
    }
)


def hint_for(error: MeshError) -> str:
    """Return what to do next, or an empty string."""
    for kind in type(error).__mro__:
        if kind in _HINTS:
            return _HINTS[kind]
    return ""
