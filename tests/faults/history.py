"""What happened in a mesh, revision by revision, recorded from etcd by nothing but generated stubs, and judged.

Deliberately none of localmesh's own code but the message types: an error in how the mesh reads its store must not hide
in how the test does.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from localmesh.store.v1 import records_pb2 as records
from localmesh.thirdparty import etcd_pb2 as etcd

_PAUSE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it stood after some revision."""

    value: bytes
    lease: int
    created: int


@dataclass(frozen=True, slots=True)
class Change:
    """All that one revision changed; None is a key that was deleted."""

    revision: int
    keys: Mapping[str, Key | None]


class Recorder:
    """Watches a prefix from revision 1, over every loss of the connection, without a gap."""

    def __init__(self, endpoint: str, prefix: str) -> None:
        self._endpoint = endpoint
        self._prefix = prefix.encode()
        self.changes: list[Change] = []
        self.revision = 0
        self.problem = ""
        """Why the record is of no use, should that be so."""

    async def run(self) -> None:
        """Record until cancelled, or until there would be a gap."""
        options = [
            ("grpc.enable_http_proxy", 0),
            ("grpc.max_reconnect_backoff_ms", 300),
            ("grpc.max_receive_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        while not self.problem:
            async with grpc.aio.insecure_channel(self._endpoint, options=options) as channel:
                try:
                    await self._follow(channel)
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(_PAUSE_SECONDS)

    async def _follow(self, channel: Any) -> None:
        watch = channel.stream_stream(
            "/etcdserverpb.Watch/Watch", etcd.WatchRequest.SerializeToString, etcd.WatchResponse.FromString
        )
        create = etcd.WatchCreateRequest(
            key=self._prefix, range_end=self._prefix[:-1] + b"0", start_revision=self.revision + 1
        )
        call = watch()
        await call.write(etcd.WatchRequest(create_request=create))
        async for response in call:
            if response.compact_revision:
                self.problem = f"etcd forgot what followed revision {self.revision}"
                return
            if response.canceled:
                return
            for event in response.events:
                self._record(event)
            self.revision = max([self.revision, *(e.kv.mod_revision for e in response.events)])

    def _record(self, event: Any) -> None:
        kv = event.kv
        if not self.changes or self.changes[-1].revision != kv.mod_revision:
            if kv.mod_revision <= self.revision:
                self.problem = f"revision {kv.mod_revision} came after {self.revision}"
            self.changes.append(Change(kv.mod_revision, {}))
        deleted = event.type == etcd.Event.DELETE
        keys = self.changes[-1].keys
        name = kv.key[len(self._prefix) :].decode()
        assert isinstance(keys, dict)
        keys[name] = None if deleted else Key(kv.value, kv.lease, kv.create_revision)


@dataclass(slots=True)
class State:
    """All keys as of one revision, and what must be remembered of those before."""

    keys: dict[str, Key] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    """Replicas of a model that each node takes, as it last said."""

    def under(self, prefix: str) -> Iterator[tuple[str, Key]]:
        """Yield the keys below a prefix, without it."""
        for name, key in self.keys.items():
            if name.startswith(prefix):
                yield name[len(prefix) :], key

    def replica(self, name: str) -> records.Replica | None:
        """Return a replica by "model/node/index"."""
        key = self.keys.get(f"replicas/{name}")
        return records.Replica.FromString(key.value) if key is not None else None

    def device(self, name: str) -> records.Device | None:
        """Return a device by "node/device"."""
        key = self.keys.get(f"devices/{name}")
        return records.Device.FromString(key.value) if key is not None else None

    def claims(self, name: str) -> dict[str, int]:
        """Return the claims on a device by replica, "model/node/index"; the store leaves the node out."""
        device, node = self.device(name), name.split("/")[0]
        named = device.claims.items() if device is not None else ()
        return {f"{claim.split('/')[0]}/{node}/{claim.split('/')[1]}": size for claim, size in named}

    def apply(self, change: Change) -> None:
        """Go on to the next revision."""
        for name, key in change.keys.items():
            if key is None:
                self.keys.pop(name, None)
            else:
                self.keys[name] = key
                if name.startswith("nodes/"):
                    self.slots[name[6:]] = records.Node.FromString(key.value).max_replicas_per_model


def violations(changes: list[Change]) -> list[str]:
    """Return what contradicts invariants 1, 2 and 4 of the design, at any revision of a history."""
    found: list[str] = []
    state = State()
    for change in changes:
        before = State(dict(state.keys), state.slots)
        state.apply(change)
        found += [f"revision {change.revision}: {v}" for v in _of_one_revision(before, state, change)]
    return found


def _of_one_revision(before: State, after: State, change: Change) -> Iterator[str]:
    for name in change.keys:
        table, _, rest = name.partition("/")
        if table == "devices":
            yield from _device(before, after, rest)
        elif table == "replicas":
            yield from _replica(before, after, rest)


def _device(before: State, after: State, name: str) -> Iterator[str]:
    """Invariant 1, and that a claim appears, grows and goes together with its replica."""
    now, claims, known = after.device(name), after.claims(name), before.claims(name)
    if now is None:
        return
    for replica, size in claims.items():
        record = after.replica(replica)
        if record is None:
            if replica not in known and replica not in _heirs(before, after):
                yield f"the device {name} has a claim of {replica}, which does not exist"
        elif record.devices[name.partition("/")[2]] != size:
            yield f"the device {name} has a claim of {size} bytes of {replica}, whose record says {record.devices}"
        elif (
            replica in known
            and before.replica(replica)
            and size != known[replica]
            and record.state < records.REPLICA_STATE_READY
        ):
            yield f"the claim of {replica} on {name} changed to {size} before it was ready"
    # T0 begins anew with the budget of that moment and what runs; a placement must fit.
    placed = [r for r in claims if _is_placement(before, after, r)]
    if placed and sum(claims.values()) > now.budget_bytes:
        yield f"{placed} made the claims on {name} {sum(claims.values())} of {now.budget_bytes} bytes"


def _heirs(before: State, after: State) -> set[str]:
    """Return who inherits from replicas that go with this revision: T7 makes claims for them before they are there."""
    gone = [
        record
        for name, _ in before.under("replicas/")
        if after.replica(name) is None and (record := before.replica(name))
    ]
    return {record.memory_for for record in gone if record.memory_for}


def _is_placement(before: State, after: State, replica: str) -> bool:
    record = after.replica(replica)
    return before.replica(replica) is None and record is not None and record.state == records.REPLICA_STATE_PLACED


def _replica(before: State, after: State, name: str) -> Iterator[str]:
    now, then = after.replica(name), before.replica(name)
    if now is None:
        yield from (f"{name} is gone and its claim on {d} stays" for d in _claims_of(after, name))
        return
    unloading = records.REPLICA_STATE_UNLOADING
    if now.state == unloading and (then is None or then.state != unloading):
        yield from (f"{name} is to be unloaded, and {h} holds it" for h, _ in after.under(f"inflight/{name}/"))
    if (
        then is not None
        and now.state < then.state
        and after.keys[f"replicas/{name}"].created == (before.keys[f"replicas/{name}"].created)
    ):
        yield f"{name} went back from {then.state} to {now.state}"
    if then is None:
        yield from _limits(after, name)


def _limits(after: State, name: str) -> Iterator[str]:
    """Invariant 4, where a record appears."""
    model, node, _ = name.split("/")
    all_of_it = [other for other, _ in after.under(f"replicas/{model}/")]
    here = [other for other in all_of_it if other.startswith(f"{node}/")]
    if len(here) > max(1, after.slots.get(node, 1)):
        yield f"{name} is one of {len(here)} on its node, which takes {after.slots.get(node)}"
    policy = after.keys.get(f"policies/{model}")
    most = records.Policy.FromString(policy.value).max_replicas if policy is not None else 0
    if most and len(all_of_it) > most:
        yield f"{name} is one of {len(all_of_it)}, of at most {most}"


def _claims_of(state: State, replica: str) -> Iterator[str]:
    for name, _ in state.under("devices/"):
        if replica in state.claims(name):
            yield name


def leftovers(changes: list[Change]) -> list[str]:
    """Return what must not be there when nothing goes on: presences, and claims that differ from the replicas'."""
    state = State()
    for change in changes:
        state.apply(change)
    found = [f"inflight/{name} is left" for name, _ in state.under("inflight/")]
    claimed: Counter[tuple[str, str, int]] = Counter()
    wanted: Counter[tuple[str, str, int]] = Counter()
    for name, _ in state.under("devices/"):
        for replica, size in state.claims(name).items():
            claimed[name, replica, size] += 1
    for name, key in state.under("replicas/"):
        node = name.split("/")[1]
        record = records.Replica.FromString(key.value)
        for device, size in record.devices.items():
            wanted[f"{node}/{device}", name, size] += 1
        node_key = state.keys.get(f"nodes/{node}")
        if node_key is None or node_key.lease != record.incarnation:
            found.append(f"{name} is of incarnation {record.incarnation:x}, not of its node's")
    found += [f"the claim {c} has no replica" for c in claimed - wanted]
    found += [f"the replica's claim {c} is missing" for c in wanted - claimed]
    return found
