"""The names of keys: every key is built here, and every key that comes from outside is checked here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, unique

from localmesh.core.ids import DeviceId, HolderId, ModelName, NodeName, ReplicaId, model_name, node_name

SELF_HOLDER = HolderId("self")
"""Holder of a replica's own count of running calls: see T2."""

MAX_INDEX = 9999
_MAX_KEY_BYTES = 1024
_MESH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_TOKEN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_INDEX = re.compile(r"0|[1-9][0-9]{0,3}")


@unique
class Table(Enum):
    """The first part of a key below the mesh."""

    META = "meta"
    MODELS = "models"
    POLICIES = "policies"
    APPROVALS = "approvals"
    NODES = "nodes"
    MEASURED = "measured"
    SOURCES = "sources"
    DEVICES = "devices"
    REPLICAS = "replicas"
    PROGRESS = "progress"
    INFLIGHT = "inflight"
    FAILURES = "failures"
    HISTORY = "history"
    GUARD = "guard"
    LEADER = "leader"


@dataclass(frozen=True, slots=True)
class SingleKey:
    """A key of which there is one: `meta/schema`, `guard` or `leader`."""

    table: Table


@dataclass(frozen=True, slots=True)
class ModelKey:
    """`models/<model>` or `policies/<model>`."""

    table: Table
    model: ModelName


@dataclass(frozen=True, slots=True)
class NodeKey:
    """`approvals/<node>`, `nodes/<node>`, `measured/<node>` or `sources/<node>`."""

    table: Table
    node: NodeName


@dataclass(frozen=True, slots=True)
class DeviceKey:
    """`devices/<node>/<device>`."""

    node: NodeName
    device: DeviceId


@dataclass(frozen=True, slots=True)
class ReplicaKey:
    """`replicas/<model>/<node>/<index>` or `progress/<model>/<node>/<index>`."""

    table: Table
    replica: ReplicaId


@dataclass(frozen=True, slots=True)
class InflightKey:
    """`inflight/<model>/<node>/<index>/<holder>`."""

    replica: ReplicaId
    holder: HolderId


@dataclass(frozen=True, slots=True)
class FailureKey:
    """`failures/<model>/<node>`."""

    model: ModelName
    node: NodeName


@dataclass(frozen=True, slots=True)
class HistoryKey:
    """`history/<model>/<node>`."""

    model: ModelName
    node: NodeName


ParsedKey = SingleKey | ModelKey | NodeKey | DeviceKey | ReplicaKey | InflightKey | FailureKey | HistoryKey


def device_id(text: str) -> DeviceId:
    """Check and return the id of a device.

    Raises:
        ValueError: It is not 1 to 128 characters of [A-Za-z0-9._:-] that start with a letter or a digit.
    """
    return DeviceId(_token(text, "device"))


def holder_id(text: str) -> HolderId:
    """Check and return the id of a holder: the same characters as a device's.

    Raises:
        ValueError: It is none.
    """
    return HolderId(_token(text, "holder"))


def _token(text: str, what: str) -> str:
    if not _TOKEN.fullmatch(text):
        raise ValueError(f"not a {what}: {text!r} (1 to 128 of letters, digits, '.', '_', ':', '-')")
    return text


def _replica(model: str, node: str, index: str) -> ReplicaId:
    if not _INDEX.fullmatch(index):  # one spelling for each replica, or two keys would name the same one
        raise ValueError(f"not the index of a replica: {index!r}")
    return ReplicaId(model_name(model), node_name(node), int(index))


class Keys:
    """The keys of one mesh, `/localmesh/<mesh>/...`."""

    def __init__(self, mesh: str) -> None:
        """Check the name of the mesh.

        Raises:
            ValueError: It cannot be part of a key.
        """
        if not _MESH.fullmatch(mesh):
            raise ValueError(
                f"not a mesh name: {mesh!r} (1 to 63 of letters, digits, '.', '_', '-', the first a letter or digit)"
            )
        self.mesh = mesh
        self._base = f"/localmesh/{mesh}/"

    @property
    def prefix(self) -> bytes:
        """Prefix of every key of the mesh."""
        return self._base.encode()

    def table(self, table: Table) -> bytes:
        """Prefix of every key of a table that has more than one."""
        return self._key(table, "")

    def schema(self) -> bytes:
        """Key of the schema's version."""
        return self._key(Table.META, "schema")

    def guard(self) -> bytes:
        """Key of the mass-expiry guard."""
        return f"{self._base}{Table.GUARD.value}".encode()

    def leader(self) -> bytes:
        """Key of the elected reconciler."""
        return f"{self._base}{Table.LEADER.value}".encode()

    def model(self, model: ModelName) -> bytes:
        """Key of a model's spec."""
        return self._key(Table.MODELS, model)

    def policy(self, model: ModelName) -> bytes:
        """Key of a model's policy."""
        return self._key(Table.POLICIES, model)

    def approval(self, node: NodeName) -> bytes:
        """Key of what the operator says of a node."""
        return self._key(Table.APPROVALS, node)

    def node(self, node: NodeName) -> bytes:
        """Key of a present node."""
        return self._key(Table.NODES, node)

    def measured(self, node: NodeName) -> bytes:
        """Key of a node's measurement."""
        return self._key(Table.MEASURED, node)

    def sources(self, node: NodeName) -> bytes:
        """Key of what a node knows of the models' files."""
        return self._key(Table.SOURCES, node)

    def devices(self, node: NodeName) -> bytes:
        """Prefix of a node's devices."""
        return self._key(Table.DEVICES, f"{node}/")

    def device(self, node: NodeName, device: DeviceId) -> bytes:
        """Key of a device."""
        return self._key(Table.DEVICES, f"{node}/{device}")

    def replicas(self, model: ModelName) -> bytes:
        """Prefix of a model's replicas."""
        return self._key(Table.REPLICAS, f"{model}/")

    def replicas_on(self, model: ModelName, node: NodeName) -> bytes:
        """Prefix of a model's replicas on one node."""
        return self._key(Table.REPLICAS, f"{model}/{node}/")

    def replica(self, replica: ReplicaId) -> bytes:
        """Key of a replica."""
        return self._key(Table.REPLICAS, str(replica))

    def progress(self, replica: ReplicaId) -> bytes:
        """Key of a replica's progress."""
        return self._key(Table.PROGRESS, str(replica))

    def holders(self, replica: ReplicaId) -> bytes:
        """Prefix of the presences on a replica."""
        return self._key(Table.INFLIGHT, f"{replica}/")

    def inflight(self, replica: ReplicaId, holder: HolderId) -> bytes:
        """Key of one holder's presence on a replica."""
        return self._key(Table.INFLIGHT, f"{replica}/{holder}")

    def failure(self, model: ModelName, node: NodeName) -> bytes:
        """Key of the memory of a failed load."""
        return self._key(Table.FAILURES, f"{model}/{node}")

    def history(self, model: ModelName, node: NodeName) -> bytes:
        """Key of what went wrong with a model on a node lately."""
        return self._key(Table.HISTORY, f"{model}/{node}")

    def _key(self, table: Table, tail: str) -> bytes:
        return f"{self._base}{table.value}/{tail}".encode()

    def parse(self, key: bytes) -> ParsedKey:
        """Read a key below `prefix`. Anybody who may write to etcd may have made it.

        Raises:
            ValueError: It is none of ours.
        """
        if len(key) > _MAX_KEY_BYTES or not key.startswith(self.prefix):
            raise ValueError(f"not a key of the mesh {self.mesh}: {key[:80]!r}")
        parts = key[len(self.prefix) :].decode("ascii").split("/")
        try:
            table = Table(parts[0])
        except ValueError:
            raise ValueError(f"no such table: {parts[0][:80]!r}") from None
        arity, read = _READERS[table]
        if len(parts) != arity + 1:
            raise ValueError(f"a key of {table.value} has {arity} parts, not {len(parts) - 1}")
        return read(table, parts[1:])


def _read_schema(table: Table, parts: list[str]) -> ParsedKey:
    if parts != ["schema"]:
        raise ValueError(f"no such key of {table.value}: {parts[0][:80]!r}")
    return SingleKey(table)


def _read_model(table: Table, parts: list[str]) -> ParsedKey:
    return ModelKey(table, model_name(parts[0]))


def _read_node(table: Table, parts: list[str]) -> ParsedKey:
    return NodeKey(table, node_name(parts[0]))


def _read_replica(table: Table, parts: list[str]) -> ParsedKey:
    return ReplicaKey(table, _replica(*parts))


_READERS: dict[Table, tuple[int, Callable[[Table, list[str]], ParsedKey]]] = {
    Table.META: (1, _read_schema),
    Table.MODELS: (1, _read_model),
    Table.POLICIES: (1, _read_model),
    Table.APPROVALS: (1, _read_node),
    Table.NODES: (1, _read_node),
    Table.MEASURED: (1, _read_node),
    Table.SOURCES: (1, _read_node),
    Table.DEVICES: (2, lambda _, parts: DeviceKey(node_name(parts[0]), device_id(parts[1]))),
    Table.REPLICAS: (3, _read_replica),
    Table.PROGRESS: (3, _read_replica),
    Table.INFLIGHT: (4, lambda _, parts: InflightKey(_replica(*parts[:3]), holder_id(parts[3]))),
    Table.FAILURES: (2, lambda _, parts: FailureKey(model_name(parts[0]), node_name(parts[1]))),
    Table.HISTORY: (2, lambda _, parts: HistoryKey(model_name(parts[0]), node_name(parts[1]))),
    Table.GUARD: (0, lambda table, _: SingleKey(table)),
    Table.LEADER: (0, lambda table, _: SingleKey(table)),
}
