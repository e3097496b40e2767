# ruff: noqa: RUF009 - _option is dataclasses.field with what makes it an option
"""The configuration of everything, as one frozen tree. The fields are the table of options.

Each field carries its kind, its unit and its help. From the tree follow, and can therefore not disagree:

* the key in a configuration file: the path in the tree (`router: {listen: ...}`, `mesh: ...`);
* the environment variable: `LOCALMESH_` and the path in capitals (`LOCALMESH_ROUTER_LISTEN`);
* the flag: the path with dashes (`--router-listen`), without the section in that section's own command
  (`localmesh router --listen`).

Reading the sources is localmesh.app.config_reader's.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from localmesh.app.kinds import BOOLEAN, BYTES, CHOICES, COUNT, LABELS, LIST, PATH, SECONDS, TEXT, Kind

DEFAULT_ETCD = "127.0.0.1:2379"
DEFAULT_ROUTER = "127.0.0.1:9500"
DEFAULT_REGISTRY = "127.0.0.1:9501"
ENROLMENT_PORT = 9502


@dataclass(frozen=True, slots=True)
class Option:
    """One setting: a leaf of the tree."""

    section: str
    """Name of the sub-tree, empty at the top."""
    name: str
    kind: Kind
    default: object
    help: str

    @property
    def key(self) -> str:
        """Path in the tree and in a configuration file: `router.listen`."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def variable(self) -> str:
        """Environment variable."""
        return "LOCALMESH_" + self.key.replace(".", "_").upper()

    def flag(self, own_section: str) -> str:
        """Return the flag in the command whose own section is given."""
        path = self.name if self.section in ("", own_section) else f"{self.section}_{self.name}"
        return "--" + path.replace("_", "-")


def _option(kind: Kind, default: object, help_text: str) -> Any:
    metadata = {"kind": kind, "help": help_text}
    if isinstance(default, MappingProxyType):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdSection:
    """How etcd is reached, or started."""

    endpoints: tuple[str, ...] = _option(
        LIST, (), "etcd's client addresses, host:port; empty: `up` starts an etcd, others use 127.0.0.1:2379"
    )
    ca: Path | None = _option(
        PATH, None, "CA certificates (PEM) that etcd's certificate is checked against: turns TLS on"
    )
    cert: Path | None = _option(PATH, None, "client certificate (PEM) for etcd")
    key: Path | None = _option(PATH, None, "key (PEM) of the client certificate for etcd")
    user: str = _option(TEXT, "", "user name for etcd")
    password_file: Path | None = _option(PATH, None, "file with the password of etcd's user")
    bin: Path | None = _option(
        PATH, None, "etcd binary that `up` starts; else `etcd` on PATH, else the extra 'embedded'"
    )
    data_dir: Path | None = _option(PATH, None, "where `up` keeps etcd's data; empty: <state-dir>/etcd")


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSection:
    """Certificates of this component. All three or none."""

    cert: Path | None = _option(PATH, None, "own certificate (PEM), re-read when the file changes")
    key: Path | None = _option(PATH, None, "key (PEM) of the own certificate")
    ca: Path | None = _option(PATH, None, "CA certificate (PEM) of the mesh: peers must show one that it signed")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistrySection:
    """The registry."""

    listen: str = _option(TEXT, DEFAULT_REGISTRY, "address to listen on, host:port; port 0 takes any")
    advertise: str = _option(TEXT, "", "address that others reach it by, where it is not the one it listens on")
    desired_dir: Path | None = _option(
        PATH,
        None,
        "folder of YAML files into which each accepted change is written before it is answered, and from "
        "which an empty store is filled",
    )
    approve: str = _option(
        CHOICES("auto", "manual"),
        "auto",
        "who lets new nodes in: auto, every worker that can connect; manual, an operator (`localmesh node approve`)",
    )
    join_token: str = _option(
        TEXT, "", "secret that new workers must show to be let in; without it an operator must approve them"
    )
    enrolment_listen: str = _option(TEXT, "", "address for new workers to enrol at; empty: none may")
    ca_dir: Path | None = _option(PATH, None, "folder of the CA that signs enrolled workers")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSection:
    """The router."""

    listen: str = _option(TEXT, DEFAULT_ROUTER, "address to listen on, host:port; port 0 takes any")
    advertise: str = _option(TEXT, "", "address that others reach it by, where it is not the one it listens on")
    name: str = _option(TEXT, "", "name in the mesh; empty: host name and port")
    hold_seconds: float = _option(SECONDS, 60.0, "how long a caller is held while a model loads")
    busy_seconds: float = _option(SECONDS, 3.0, "after how long with all replicas busy a model gets another one")
    idle_seconds: float = _option(SECONDS, 300.0, "after how long without use a model goes down to its minimum")
    drain_patience_seconds: float = _option(
        SECONDS, 60.0, "how long a replica on a draining node waits for a place elsewhere"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSection:
    """The worker."""

    name: str = _option(TEXT, "", "the node's name in the mesh; empty: the host's name")
    registries: tuple[str, ...] = _option(LIST, (DEFAULT_REGISTRY,), "registries to register at, host:port")
    listen: str = _option(TEXT, "127.0.0.1:0", "address of the worker's own service, host:port; port 0 takes any")
    advertise: str = _option(TEXT, "", "host under which others reach this node, where it is not the one listened on")
    replica_ports: str = _option(TEXT, "0", "ports of the replicas: 0 (any) or a range such as 9600-9699")
    labels: Mapping[str, str] = _option(LABELS, MappingProxyType({}), "labels for placement")
    memory_budget: str = _option(
        TEXT, "90%", "memory that replicas may claim, of RAM and of each GPU: a size or a percentage"
    )
    max_replicas_per_model: int = _option(COUNT, 1, "replicas of one model that this node may run")
    served_by: str = _option(
        CHOICES("auto", "on", "off"), "auto", "trailers that name the replica that served; auto: on loopback only"
    )
    join_token: str = _option(TEXT, "", "the registry's join token, which approves this node")
    join: str = _option(TEXT, "", "enrol with this join token (HOST:PORT/SECRET.PIN) before the first start")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpSection:
    """The whole mesh on one machine."""

    workers: int = _option(COUNT, 1, "workers to run")
    listen: str = _option(TEXT, "", "address of this machine to serve others at: turns TLS on, lets workers join")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSection:
    """What the commands talk to, and how they print."""

    router: str = _option(TEXT, DEFAULT_ROUTER, "the router's address, host:port")
    registry: str = _option(TEXT, DEFAULT_REGISTRY, "the registry's address, host:port")
    timeout_seconds: float = _option(SECONDS, 300.0, "how long to wait for an answer")
    output: str = _option(CHOICES("table", "json"), "table", "how to print: for people, or for programs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of one process."""

    mesh: str = _option(TEXT, "main", "name of the mesh; meshes share an etcd unseen by one another")
    state_dir: Path = _option(PATH, Path(), "where this machine keeps its state; empty: $XDG_STATE_HOME/localmesh")
    models_dir: Path | None = _option(PATH, None, "where models' files are looked for; empty: <state-dir>/models")
    backends_dir: Path | None = _option(PATH, None, "where foreign backends are; empty: <state-dir>/backends")
    log_level: str = _option(CHOICES("debug", "info", "warning", "error"), "info", "what is logged")
    max_message_bytes: int = _option(BYTES, 64 << 20, "size of a gRPC message at most, everywhere")
    drain_seconds: float = _option(SECONDS, 10.0, "time that running calls get when something stops")
    insecure: bool = _option(BOOLEAN, False, "serve and call without TLS on addresses other than loopback")
    etcd: EtcdSection = EtcdSection()
    tls: TlsSection = TlsSection()
    registry: RegistrySection = RegistrySection()
    router: RouterSection = RouterSection()
    worker: WorkerSection = WorkerSection()
    up: UpSection = UpSection()
    client: ClientSection = ClientSection()

    @property
    def models_folder(self) -> Path:
        """Folder of the models' files."""
        return self.models_dir or self.state_dir / "models"

    @property
    def backends_folder(self) -> Path:
        """Folder of the foreign backends."""
        return self.backends_dir or self.state_dir / "backends"

    @property
    def etcd_endpoints(self) -> tuple[str, ...]:
        """Where a component finds etcd."""
        return self.etcd.endpoints or (DEFAULT_ETCD,)

    @property
    def etcd_folder(self) -> Path:
        """Folder of etcd's durable data."""
        return self.etcd.data_dir or self.state_dir / "etcd"


SECTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "etcd": EtcdSection,
        "tls": TlsSection,
        "registry": RegistrySection,
        "router": RouterSection,
        "worker": WorkerSection,
        "up": UpSection,
        "client": ClientSection,
    }
)


def _options() -> Iterator[Option]:
    for section, tree in (("", Config), *SECTIONS.items()):
        for leaf in fields(tree):  # type: ignore[arg-type]  # each is a dataclass
            if leaf.metadata:
                default = leaf.default if leaf.default_factory is MISSING else leaf.default_factory()
                yield Option(section, leaf.name, leaf.metadata["kind"], default, leaf.metadata["help"])


OPTIONS: Mapping[str, Option] = MappingProxyType({option.key: option for option in _options()})
"""Every setting by its key."""


def build(values: Mapping[str, object]) -> Config:
    """Return the tree with the given values by key; what is not given has its default."""
    sections: dict[str, dict[str, object]] = {name: {} for name in SECTIONS}
    top: dict[str, Any] = {}
    for key, value in values.items():
        option = OPTIONS[key]
        if option.section:
            sections[option.section][option.name] = value
        else:
            top[option.name] = value
    return Config(**top, **{name: SECTIONS[name](**given) for name, given in sections.items()})


def flatten(config: Config) -> dict[str, object]:
    """Return the values that differ from the defaults, by key: what `build` needs to make the same tree."""
    found: dict[str, object] = {}
    for key, option in OPTIONS.items():
        holder = getattr(config, option.section) if option.section else config
        value = getattr(holder, option.name)
        if value != option.default:
            found[key] = value
    return found
