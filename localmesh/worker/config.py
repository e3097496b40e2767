"""How a worker is set up."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from localmesh.core.ids import NodeName
from localmesh.rpc.addresses import host_of
from localmesh.rpc.tls import TlsFiles
from localmesh.worker.machine import MachineConfig
from localmesh.worker.ports import PortRange


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """One worker. Folders are made when they are missing; `run_dir` belongs to one worker at a time."""

    mesh: str
    node: NodeName
    registries: tuple[str, ...]
    """Addresses host:port; any of them will do."""
    models_dir: Path
    backends_dir: Path
    state_dir: Path
    """Keeps the node's key."""
    cache_dir: Path
    """Conversions of models; may be deleted at any time."""
    run_dir: Path
    """Sockets, spec files and logs of the replicas."""
    listen: str = "127.0.0.1:0"
    """Address of the WorkerService."""
    advertise: str = ""
    """Host by which others reach the worker and its replicas; empty is the host listened on."""
    replica_ports: PortRange | None = None
    """None lets the system choose."""
    replica_listen_host: str = "127.0.0.1"
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    max_replicas_per_model: int = 1
    memory_budget: str = "90%"
    """Of the RAM: a part or an amount, see localmesh.core.budgets."""
    gpu_memory_budget: str = "90%"
    """Of each GPU."""
    tls: TlsFiles | None = None
    insecure: bool = False
    join_token: str = ""
    drain_seconds: float = 10.0
    """How long a replica may finish what runs when it is stopped."""
    loads: MachineConfig = field(default_factory=MachineConfig)
    heartbeat_seconds: float = 1.0
    ack_seconds: float = 2.5
    """Silence of a registry after which the next one is tried."""
    call_seconds: float = 5.0
    """Deadline of Register and Deregister."""
    max_message_bytes: int = 64 << 20
    served_by_trailers: bool = False
    log_bytes: int = 16 << 20
    """Disk that the output of one replica's process may take."""
    kept_logs: int = 16
    """Ended processes whose output is kept, at most."""
    kept_log_bytes: int = 10 << 20
    """Disk that the output of ended processes may take; that of the last one is kept in any case."""
    backend_bytes: int = 64 << 30
    """Disk that one installed backend may take, and the archive that it comes from."""
    backend_entries: int = 500_000
    """Files, folders and links of one installed backend."""
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """The worker's own environment; what replicas may see of it is passed on."""
    replica_command: tuple[str, ...] = ()
    """What is run as a replica; empty is this Python with localmesh.replica."""

    @property
    def installed_dir(self) -> Path:
        """Backends that operators have installed on this node; `backends_dir` has those put there by hand."""
        return self.state_dir / "backends"

    @property
    def advertise_host(self) -> str:
        """Host that replicas advertise, without a port; empty for the one that they listen on."""
        return host_of(self.advertise)
