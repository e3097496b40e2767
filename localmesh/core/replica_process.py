"""What a worker and the replica process that it starts say to each other, as plain values.

The worker writes a `ReplicaSpecFile` (JSON, mode 0600) and starts the process with its path. The process writes status
events to a file descriptor that it inherits, one JSON object a line. Reading is strict both ways: what is missing,
unknown or of the wrong type is a ValueError that names the key: a disagreement of the two sides is seen at once.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from localmesh.core.ids import DeviceId, ReplicaId, model_name, node_name
from localmesh.core.records import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsPaths:
    """PEM files of the replica's own identity and of the mesh's authority."""

    cert: str
    key: str
    ca: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpecFile:
    """Everything that a replica process has to know."""

    mesh: str
    replica: ReplicaId
    revision: str
    """Revision of the model that is loaded."""
    spec: ModelSpec
    source_path: str
    """Absolute path of the model's file or folder; empty where the spec has no source."""
    backend_dir: str = ""
    """With engine process:NAME the folder that holds run.sh."""
    listen: str = "127.0.0.1:0"
    advertise_host: str = ""
    """Host that others reach the replica by; empty is the host of `listen`."""
    devices: Mapping[DeviceId, int]
    """Bytes claimed on each device."""
    gpu: bool = False
    """Whether one of the devices is a GPU."""
    run_dir: str
    """Private folder for sockets, removed by the worker after the exit."""
    cache_dir: str
    """Folder for conversions, shared by the replicas of the node."""
    tls: TlsPaths | None = None
    insecure: bool = False
    max_message_bytes: int = 64 << 20
    drain_seconds: float = 10.0
    served_by_trailers: bool = False
    parent_pid: int
    """The worker: the replica ends when its parent is another process."""

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps(
            {
                "mesh": self.mesh,
                "model": self.replica.model,
                "node": self.replica.node,
                "index": self.replica.index,
                "revision": self.revision,
                "spec": _spec_to_object(self.spec),
                "source_path": self.source_path,
                "backend_dir": self.backend_dir,
                "listen": self.listen,
                "advertise_host": self.advertise_host,
                "devices": dict(self.devices),
                "gpu": self.gpu,
                "run_dir": self.run_dir,
                "cache_dir": self.cache_dir,
                "tls": None if self.tls is None else {"cert": self.tls.cert, "key": self.tls.key, "ca": self.tls.ca},
                "insecure": self.insecure,
                "max_message_bytes": self.max_message_bytes,
                "drain_seconds": self.drain_seconds,
                "served_by_trailers": self.served_by_trailers,
                "parent_pid": self.parent_pid,
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> "ReplicaSpecFile":
        """Read what `to_json` wrote.

        Raises:
            ValueError: A key is missing, unknown or of the wrong type; it is named.
        """
        fields = _Fields(_load_object(text), "the replica's spec file")
        tls = fields.optional_object("tls")
        result = cls(
            mesh=fields.text("mesh"),
            replica=ReplicaId(
                model_name(fields.text("model")), node_name(fields.text("node")), fields.natural("index")
            ),
            revision=fields.text("revision"),
            spec=_spec_from_object(fields.object("spec")),
            source_path=fields.text("source_path"),
            backend_dir=fields.text("backend_dir"),
            listen=fields.text("listen"),
            advertise_host=fields.text("advertise_host"),
            devices=MappingProxyType({DeviceId(k): v for k, v in fields.naturals("devices").items()}),
            gpu=fields.boolean("gpu"),
            run_dir=fields.text("run_dir"),
            cache_dir=fields.text("cache_dir"),
            tls=None if tls is None else _tls_from_object(tls),
            insecure=fields.boolean("insecure"),
            max_message_bytes=fields.natural("max_message_bytes"),
            drain_seconds=fields.number("drain_seconds"),
            served_by_trailers=fields.boolean("served_by_trailers"),
            parent_pid=fields.natural("parent_pid"),
        )
        fields.finish()
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEvent:
    """What the process does on its way to being ready."""

    phase: str
    """"starting", "converting" or "loading"."""
    done_bytes: int = 0
    total_bytes: int = 0
    """0 when the size is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListeningEvent:
    """The port is open; the model is not loaded yet."""

    endpoint: str
    """Advertised "host:port"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyEvent:
    """The model is loaded and requests are accepted."""

    endpoint: str
    limit: int
    """Requests accepted at once."""
    memory_bytes: int
    """Memory of the process and its children, shared pages divided by their users."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadEvent:
    """How busy the replica is. Sent on change, at most once a second."""

    in_flight: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedEvent:
    """The replica gives up; its exit follows."""

    reason: str
    """Name of an error reason, as in localmesh.core.errors, or "PORT_IN_USE"."""
    message: str


StatusEvent = PhaseEvent | ListeningEvent | ReadyEvent | LoadEvent | FailedEvent


def status_to_json(event: StatusEvent) -> str:
    """Return the event as one line, without the newline."""
    match event:
        case PhaseEvent():
            body: dict[str, object] = {
                "event": "phase",
                "phase": event.phase,
                "done_bytes": event.done_bytes,
                "total_bytes": event.total_bytes,
            }
        case ListeningEvent():
            body = {"event": "listening", "endpoint": event.endpoint}
        case ReadyEvent():
            body = {
                "event": "ready",
                "endpoint": event.endpoint,
                "limit": event.limit,
                "memory_bytes": event.memory_bytes,
            }
        case LoadEvent():
            body = {"event": "load", "in_flight": event.in_flight, "memory_bytes": event.memory_bytes}
        case FailedEvent():
            body = {"event": "failed", "reason": event.reason, "message": event.message}
    return json.dumps(body)


def parse_status(line: str | bytes) -> StatusEvent:
    """Read one status line.

    Raises:
        ValueError: It is no status event; the reason is in the message.
    """
    fields = _Fields(_load_object(line), "a replica's status line")
    name = fields.text("event")
    read = _EVENTS.get(name)
    if read is None:
        raise ValueError(f"a replica's status line has the unknown event {name!r}")
    event = read(fields)
    fields.finish()
    return event


def _phase(f: "_Fields") -> StatusEvent:
    return PhaseEvent(phase=f.text("phase"), done_bytes=f.natural("done_bytes"), total_bytes=f.natural("total_bytes"))


def _ready(f: "_Fields") -> StatusEvent:
    return ReadyEvent(endpoint=f.text("endpoint"), limit=f.natural("limit"), memory_bytes=f.natural("memory_bytes"))


def _load(f: "_Fields") -> StatusEvent:
    return LoadEvent(in_flight=f.natural("in_flight"), memory_bytes=f.natural("memory_bytes"))


_EVENTS: Mapping[str, Callable[["_Fields"], StatusEvent]] = {
    "phase": _phase,
    "listening": lambda f: ListeningEvent(endpoint=f.text("endpoint")),
    "ready": _ready,
    "load": _load,
    "failed": lambda f: FailedEvent(reason=f.text("reason"), message=f.text("message")),
}


def _spec_to_object(spec: ModelSpec) -> dict[str, object]:
    return {
        "name": spec.name,
        "backend": spec.backend,
        "source": spec.source,
        "context_tokens": spec.context_tokens,
        "slots": spec.slots,
        "threads": spec.threads,
        "gpu_layers": spec.gpu_layers,
        "cache_type": spec.cache_type,
        "embeddings": spec.embeddings,
        "max_concurrent_requests": spec.max_concurrent_requests,
        "options": dict(spec.options),
        "memory_bytes": spec.memory_bytes,
        "device_kind": spec.device_kind,
        "device_count": spec.device_count,
    }


def _spec_from_object(body: Mapping[str, Any]) -> ModelSpec:
    fields = _Fields(body, "the replica's spec file: spec")
    spec = ModelSpec(
        name=model_name(fields.text("name")),
        backend=fields.text("backend"),
        source=fields.text("source"),
        context_tokens=fields.natural("context_tokens"),
        slots=fields.natural("slots"),
        threads=fields.natural("threads"),
        gpu_layers=fields.optional_integer("gpu_layers"),
        cache_type=fields.text("cache_type"),
        embeddings=fields.boolean("embeddings"),
        max_concurrent_requests=fields.natural("max_concurrent_requests"),
        options=MappingProxyType(fields.texts("options")),
        memory_bytes=fields.natural("memory_bytes"),
        device_kind=fields.text("device_kind"),
        device_count=fields.natural("device_count"),
    )
    fields.finish()
    return spec


def _tls_from_object(body: Mapping[str, Any]) -> TlsPaths:
    fields = _Fields(body, "the replica's spec file: tls")
    paths = TlsPaths(cert=fields.text("cert"), key=fields.text("key"), ca=fields.text("ca"))
    fields.finish()
    return paths


def _load_object(text: str | bytes) -> Mapping[str, Any]:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ValueError(f"expected a JSON object, got {type(body).__name__}")
    return body


class _Fields:
    """Takes typed values out of a JSON object and knows which were never taken."""

    def __init__(self, body: Mapping[str, Any], where: str) -> None:
        self._left = dict(body)
        self._where = where

    def _take(self, key: str, kind: type | tuple[type, ...], what: str) -> Any:
        if key not in self._left:
            raise ValueError(f"{self._where}: {key!r} is missing")
        value = self._left.pop(key)
        # bool is an int in Python, but not in JSON
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self._where}: {key!r} is not {what}: {value!r}")
        return value

    def text(self, key: str) -> str:
        return str(self._take(key, str, "a string"))

    def boolean(self, key: str) -> bool:
        return bool(self._take(key, bool, "true or false"))

    def natural(self, key: str) -> int:
        value = int(self._take(key, int, "a whole number"))
        if value < 0:
            raise ValueError(f"{self._where}: {key!r} is negative: {value}")
        return value

    def number(self, key: str) -> float:
        return float(self._take(key, (int, float), "a number"))

    def optional_integer(self, key: str) -> int | None:
        value = self._take(key, (int, type(None)), "a whole number or null")
        return None if value is None else int(value)

    def object(self, key: str) -> Mapping[str, Any]:
        return dict(self._take(key, dict, "an object"))

    def optional_object(self, key: str) -> Mapping[str, Any] | None:
        value = self._take(key, (dict, type(None)), "an object or null")
        return None if value is None else dict(value)

    def texts(self, key: str) -> dict[str, str]:
        fields = _Fields(self.object(key), f"{self._where}: {key}")
        return {name: fields.text(name) for name in list(fields._left)}

    def naturals(self, key: str) -> dict[str, int]:
        fields = _Fields(self.object(key), f"{self._where}: {key}")
        return {name: fields.natural(name) for name in list(fields._left)}

    def finish(self) -> None:
        if self._left:
            raise ValueError(f"{self._where}: unknown {', '.join(map(repr, sorted(self._left)))}")
