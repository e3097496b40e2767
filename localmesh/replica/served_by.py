"""Who served a call, told in its trailers where the operator wants that."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from localmesh.core.ids import ReplicaId
from localmesh.rpc.interceptors import CallInterceptor
from localmesh.rpc.metadata import SERVED_BY_NODE, SERVED_BY_REPLICA, Metadata


class ServedBy(CallInterceptor):
    """Puts the names of node and replica on every call but those of gRPC's own services."""

    def __init__(self, replica: ReplicaId) -> None:
        super().__init__()
        self._trailers: Metadata = ((SERVED_BY_NODE, replica.node), (SERVED_BY_REPLICA, str(replica)))

    @asynccontextmanager
    async def around(self, method: str, context: Any) -> AsyncIterator[None]:
        """See CallInterceptor."""
        if method.startswith("/grpc."):
            yield
            return
        context.set_trailing_metadata(self._trailers)  # before: an error keeps them
        yield
        theirs = tuple((key, value) for key, value in context.trailing_metadata() or () if key != SERVED_BY_NODE)
        kept = tuple((key, value) for key, value in theirs if key != SERVED_BY_REPLICA)
        context.set_trailing_metadata((*kept, *self._trailers))  # after: what a backend sent has replaced them
