"""How a registry is set up."""

from dataclasses import dataclass, field

from localmesh.scheduling.failures import FailurePolicy
from localmesh.store.membership import LeaseTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryConfig:
    """How the registry behaves. Where it listens is the server's."""

    auto_approve: bool = True
    """A node of which nobody has said anything is approved when it registers; unless there is a join token."""
    join_token: str = field(default="", repr=False)
    """The secret by which a node is approved when it registers. With one, that is the only way besides an operator."""
    max_pending: int = 256
    """Nodes that wait for approval and are remembered at most: whoever reaches the registry may make up names."""
    leases: LeaseTimes = field(default_factory=LeaseTimes)
    """How long a node's presence and its records outlive its last heartbeat."""
    failures: FailurePolicy = field(default_factory=FailurePolicy)
    """When a node where a model failed is tried again for it."""
    write_seen_seconds: float = 2.0
    """How long an answer waits at most until this registry's own view shows what was written."""
    registered_seen_seconds: float = 0.5
    """How long a new stream waits at most until this registry's own view shows the registration that it belongs to.
    Another registry may have made it a moment ago; if not, the worker shall know soon that it has ended."""
    progress_seconds: float = 1.0
    """Between two writes of one replica's progress, or of its own count of calls, at least."""
    measured_seconds: float = 30.0
    """Between two writes of a node's measurement at most, once it changed at all."""
    measured_change: float = 0.05
    """A change of a measurement by this part is written at once."""
    budget_part: float = 0.9
    """Part of a device's memory that may be claimed where its worker does not say."""
