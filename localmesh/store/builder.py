"""From keys and values to snapshots: copies only what a change touches."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from localmesh.core.snapshot import Snapshot
from localmesh.etcd import KeyValue
from localmesh.store import codec
from localmesh.store.keys import (
    DeviceKey,
    FailureKey,
    HistoryKey,
    InflightKey,
    Keys,
    ModelKey,
    NodeKey,
    ParsedKey,
    ReplicaKey,
    SingleKey,
    Table,
)

logger = logging.getLogger(__name__)

_MAX_REMEMBERED = 1000


class Complaints:
    """Says once of each key that it cannot be read, so that a key that is rewritten all the time floods no log."""

    def __init__(self) -> None:
        self._known: set[bytes] = set()

    def about(self, key: bytes, problem: ValueError) -> None:
        """Log the problem, unless it was logged for this key before."""
        if key in self._known:
            return
        if len(self._known) >= _MAX_REMEMBERED:
            self._known.clear()
        self._known.add(key)
        logger.warning("ignored the key %r: %s", key[:200], problem)

    def settled(self, key: bytes) -> None:
        """Forget what was said: the key can be read now."""
        self._known.discard(key)


class SnapshotBuilder:
    """Applies changes to a snapshot and makes the next one. Used once."""

    def __init__(self, base: Snapshot, keys: Keys, complaints: Complaints) -> None:
        self._base = base
        self._keys = keys
        self._complaints = complaints
        self._tables: dict[str, dict[Any, Any]] = {}
        self._rows: dict[tuple[str, Hashable], dict[Any, Any]] = {}
        self._single: dict[str, Any] = {}

    def put(self, kv: KeyValue) -> None:
        """Apply a put. What cannot be read is logged, and is not in the snapshot: nobody may act on a guess."""
        try:
            key = self._keys.parse(kv.key)
        except ValueError as problem:
            self._complaints.about(kv.key, problem)
            return
        try:
            self._put(key, kv)
            self._complaints.settled(kv.key)
        except ValueError as problem:
            self._complaints.about(kv.key, problem)
            self._delete(key)

    def delete(self, key: bytes) -> None:
        """Apply a delete."""
        try:
            parsed = self._keys.parse(key)
        except ValueError:
            return
        self._delete(parsed)

    def build(self, revision: int) -> Snapshot:
        """Return the snapshot as of a revision."""
        for (table, outer), row in self._rows.items():
            if row:
                self._table(table)[outer] = MappingProxyType(row)
            else:
                self._table(table).pop(outer, None)
        changed: dict[str, Any] = {name: MappingProxyType(table) for name, table in self._tables.items()}
        return replace(self._base, revision=revision, **changed, **self._single)

    def _table(self, name: str) -> dict[Any, Any]:
        """A copy of a table, made at the first change."""
        table = self._tables.get(name)
        if table is None:
            table = self._tables[name] = dict(getattr(self._base, name))
        return table

    def _row(self, name: str, outer: Hashable) -> dict[Any, Any]:
        """A copy of one entry of a table of tables, made at the first change."""
        row = self._rows.get((name, outer))
        if row is None:
            known: Mapping[Any, Mapping[Any, Any]] = getattr(self._base, name)
            row = self._rows[name, outer] = dict(known.get(outer, {}))
        return row

    def _put(self, key: ParsedKey, kv: KeyValue) -> None:
        match key:
            case InflightKey(replica, holder):
                self._row("inflight", replica)[holder] = codec.decode_inflight(kv.value)[0]
            case ReplicaKey(Table.REPLICAS, replica):
                record = codec.decode_replica(replica, kv.value, kv.mod_revision, kv.create_revision)
                self._row("replicas", replica.model)[replica] = record
            case ReplicaKey(_, replica):
                self._table("progress")[replica] = codec.decode_progress(kv.value)
            case DeviceKey(node, device):
                self._row("devices", node)[device] = codec.decode_device(node, device, kv.value, kv.mod_revision)
            case FailureKey(model, node):
                self._row("failures", model)[node] = codec.decode_failure(model, node, kv.value)
            case ModelKey(Table.MODELS, model):
                self._table("models")[model] = codec.decode_model(model, kv.value, kv.mod_revision)
            case ModelKey(_, model):
                self._table("policies")[model] = codec.decode_policy(kv.value, kv.mod_revision)
            case NodeKey():
                self._table(_OF_NODE[key.table])[key.node] = _decode_of_node(key, kv)
            case SingleKey(Table.LEADER):
                self._single["leader"] = kv.value.decode(errors="replace")
            case SingleKey(Table.GUARD):
                self._single["guarded"] = True  # whatever is in it
                self._single["guarded_nodes"] = codec.decode_guard(kv.value)
            case HistoryKey():
                pass  # only the transactions that write it need it
            case SingleKey():
                pass  # the schema is checked when a component joins

    def _delete(self, key: ParsedKey) -> None:
        match key:
            case InflightKey(replica, holder):
                self._row("inflight", replica).pop(holder, None)
            case ReplicaKey(Table.REPLICAS, replica):
                self._row("replicas", replica.model).pop(replica, None)
            case ReplicaKey(_, replica):
                self._table("progress").pop(replica, None)
            case DeviceKey(node, device):
                self._row("devices", node).pop(device, None)
            case FailureKey(model, node):
                self._row("failures", model).pop(node, None)
            case ModelKey(table, model):
                self._table("models" if table is Table.MODELS else "policies").pop(model, None)
            case NodeKey(table, node):
                self._table(_OF_NODE[table]).pop(node, None)
            case SingleKey(Table.LEADER):
                self._single["leader"] = ""
            case SingleKey(Table.GUARD):
                self._single["guarded"], self._single["guarded_nodes"] = False, frozenset()
            case SingleKey() | HistoryKey():
                pass


_OF_NODE = {
    Table.APPROVALS: "approvals",
    Table.NODES: "nodes",
    Table.MEASURED: "measured",
    Table.SOURCES: "sources",
}


def _decode_of_node(key: NodeKey, kv: KeyValue) -> object:
    if key.table is Table.APPROVALS:
        return codec.decode_approval(kv.value, kv.mod_revision)
    if key.table is Table.NODES:
        return codec.decode_node(key.node, kv.value, kv.lease, kv.mod_revision)
    if key.table is Table.MEASURED:
        return codec.decode_measured(kv.value)
    return codec.decode_sources(kv.value)
