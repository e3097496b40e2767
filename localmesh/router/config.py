"""What a router is told."""

from dataclasses import dataclass, field

from localmesh.balancing import RetryPolicy
from localmesh.rpc.server import ServerConfig
from localmesh.scheduling.reconcile import ReconcileConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Settings of a router. Times are seconds."""

    mesh: str
    name: str
    """Name of this router, unique in the mesh: the election and the status show it."""
    server: ServerConfig
    version: str = ""
    hold_seconds: float = 60.0
    """How long a caller is held at most, for a slot or while its model loads."""
    return_seconds: float = 3.0
    """How long a request waits for a node that has just fallen silent, before its model is loaded elsewhere."""
    max_waiting_per_model: int = 1000
    """Callers held at once for one model; more are refused at once."""
    many_holders: int = 5
    """From this number of holders on, a pick compares two sampled replicas instead of all."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    reconcile: ReconcileConfig = field(default_factory=ReconcileConfig)
    reconcile_interval_seconds: float = 1.0
    """How often the leader plans even when nothing has changed."""
    health_interval_seconds: float = 1.0
    """How often the health of the models is looked at, at most."""
