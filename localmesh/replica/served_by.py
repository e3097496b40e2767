"""Who served a call, told in its trailers where the operator wants that."""

from typing import Any

from localmesh.core.ids import ReplicaId
from localmesh.rpc.metadata import SERVED_BY_NODE, SERVED_BY_REPLICA, Metadata


class ServedBy:
    """The trailers that name this replica, or none."""

    def __init__(self, replica: ReplicaId, *, enabled: bool) -> None:
        self.trailers: Metadata = ((SERVED_BY_NODE, replica.node), (SERVED_BY_REPLICA, str(replica))) if enabled else ()

    def tell(self, context: Any) -> None:
        """Put the trailers on a call. Errors keep them."""
        if self.trailers:
            context.set_trailing_metadata(self.trailers)
