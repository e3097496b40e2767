"""Names of the metadata that localmesh itself reads and writes, and what a proxy may pass on."""

from collections.abc import Iterable
from typing import Final

Metadata = tuple[tuple[str, str | bytes], ...]
"""Metadata of a call as grpc.aio takes it: keys in lower case, values bytes where the key ends in "-bin"."""

PREFIX: Final = "localmesh-"
"""Keys that begin so are ours: between a proxy and its neighbours they are not passed on, but for FORWARDED."""

MODEL: Final = "localmesh-model"
"""On a request: the model that it is for."""
REPLICA: Final = "localmesh-replica"
"""On a request: the replica that it was picked for, "model/node/index"."""
REVISION: Final = "localmesh-revision"
"""On a request: the revision of the model that it was picked for."""
SERVED_BY_NODE: Final = "localmesh-served-by-node"
"""On a response: the node that served it."""
SERVED_BY_REPLICA: Final = "localmesh-served-by-replica"
"""On a response: the replica that served it, "model/node/index"."""

FORWARDED: Final = frozenset({MODEL, REPLICA, REVISION})
"""Our keys that a proxy passes on with a request."""

ANSWERED: Final = frozenset({SERVED_BY_NODE, SERVED_BY_REPLICA})
"""Our keys that a proxy passes back with a response."""

_STATUS_DETAILS: Final = "grpc-status-details-bin"
_OF_THE_TRANSPORT: Final = frozenset({"te", "content-type", "user-agent", "host", "connection", "transfer-encoding"})


def first(metadata: Iterable[tuple[str, str | bytes]] | None, key: str) -> str:
    """Return the first value of a text key, or an empty string."""
    for found, value in metadata or ():
        if found == key:
            return value if isinstance(value, str) else value.decode("latin-1")
    return ""


def of_request(received: Iterable[tuple[str, str | bytes]] | None, extra: Metadata = ()) -> Metadata:
    """Return the metadata to send on with a request: what came, without the transport's own, then `extra`.

    A key of `extra` replaces all values that came under it.
    """
    replaced = {key for key, _ in extra}
    passed = tuple((k, v) for k, v in received or () if k not in replaced and _passes(k, FORWARDED))
    return passed + extra


def of_response(received: Iterable[tuple[str, str | bytes]] | None) -> Metadata:
    """Return the initial metadata or trailers to send back: what came, without the transport's own."""
    return tuple((k, v) for k, v in received or () if k == _STATUS_DETAILS or _passes(k, ANSWERED))


def _passes(key: str, ours: frozenset[str]) -> bool:
    if key in _OF_THE_TRANSPORT or key.startswith(("grpc-", ":")):
        return False
    return not key.startswith(PREFIX) or key in ours
