"""A mesh's store in a real etcd, with the short-cuts that the store's tests share."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any

from localmesh.core.clock import SystemClock
from localmesh.core.ids import CPU, DeviceId, ModelName, NodeName, ReplicaId
from localmesh.core.records import ModelRecord, ModelSpec, Policy, ReplicaRecord, ReplicaState
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import EtcdClient, EtcdConfig, TxnResult, UnknownOutcome
from localmesh.store import (
    DeviceFacts,
    Holder,
    HolderConfig,
    LeaseTimes,
    MeshStore,
    Mirror,
    Placement,
    Registered,
    Registration,
    RunningReplica,
)

CLOCK = SystemClock()
GIB = 1 << 30
DEADLINE_SECONDS = 20.0

M, N = ModelName("m"), NodeName("n1")
M0 = ReplicaId(M, N, 0)


def soon() -> float:
    """A deadline that only a hung test misses."""
    return CLOCK.monotonic() + DEADLINE_SECONDS


class LossyEtcd(EtcdClient):
    """Loses answers: each entry of `losses` is for one write, "applied" or "not applied" (None: answers)."""

    losses: list[str | None]

    def __init__(self, config: EtcdConfig) -> None:
        super().__init__(config, CLOCK)
        self.losses = []

    async def transaction(self, compare: Any, success: Any = (), failure: Any = (), **how: Any) -> TxnResult:
        writes = any(type(op).__name__ in ("Put", "Delete") for op in success)
        loss = self.losses.pop(0) if writes and self.losses else None
        if loss == "not applied":
            raise UnknownOutcome("the answer was lost before it was sent")
        result = await super().transaction(compare, success, failure, **how)
        if loss == "applied":
            raise UnknownOutcome("the answer was lost")
        return result


class Kit:
    """One mesh."""

    def __init__(self, etcd: EtcdClient, mesh: str) -> None:
        self.etcd = etcd
        self.store = MeshStore(etcd, mesh, CLOCK)
        self.mirror = Mirror(self.store)
        self.nodes: dict[NodeName, Registered] = {}

    async def load(self) -> Snapshot:
        return await self.store.load()

    async def model(self, name: ModelName = M, *, slots: int = 0, **policy: Any) -> ModelRecord:
        spec = ModelSpec(name=name, backend="llama", source="x.gguf", slots=slots)
        return (await self.store.put_model(spec, Policy(**policy)))[0]

    async def node(
        self,
        name: NodeName = N,
        *,
        gib: int = 4,
        slots: int = 4,
        key: str = "",
        running: Iterable[RunningReplica] = (),
        auto_approve: bool = True,
        presence_seconds: int = 60,
        devices: Mapping[DeviceId, int] | None = None,
    ) -> Registered:
        """Register a node; its presence outlives any test unless it is told otherwise."""
        budgets = devices if devices is not None else {CPU: gib * GIB}
        registration = Registration(
            node=name,
            key_fingerprint=key or f"key-of-{name}",
            endpoint=f"{name}:1",
            devices=tuple(
                DeviceFacts(id=device, kind="cpu", total_bytes=size, budget_bytes=size)
                for device, size in budgets.items()
            ),
            max_replicas_per_model=slots,
            running=tuple(running),
            auto_approve=auto_approve,
        )
        times = LeaseTimes(presence_seconds=presence_seconds, record_seconds=120)
        self.nodes[name] = await self.store.register(registration, times)
        return self.nodes[name]

    async def place(self, replica: ReplicaId = M0, *, gib: int = 1, snapshot: Snapshot | None = None) -> ReplicaRecord:
        return await self.store.place(self.plan(replica, snapshot or await self.load(), gib=gib))

    def plan(self, replica: ReplicaId, snapshot: Snapshot, *, gib: int = 1) -> Placement:
        return Placement(
            replica=replica,
            revision=snapshot.models[replica.model].revision,
            devices={CPU: gib * GIB},
            incarnation=snapshot.nodes[replica.node].incarnation,
            snapshot=snapshot,
        )

    async def ready(self, replica: ReplicaId = M0, *, gib: int = 1) -> ReplicaRecord:
        """Place a replica and report it READY."""
        record = await self.place(replica, gib=gib)
        return await self.report_ready(record)

    async def report_ready(self, record: ReplicaRecord) -> ReplicaRecord:
        return await self.store.report(record, state=ReplicaState.READY, endpoint="127.0.0.1:1", limit=8)

    async def mesh_with_a_ready_replica(self) -> ReplicaRecord:
        await self.model()
        await self.node()
        return await self.ready()

    async def seen(self, revision: int) -> Snapshot:
        """Wait until the mirror has applied a revision."""
        return await self.mirror.wait_for(lambda s: s if s.revision >= revision else None, soon())

    async def until(self, condition: Callable[[Snapshot], bool]) -> Snapshot:
        """Wait for the mirror to show something."""
        return await self.mirror.wait_for(lambda s: s if condition(s) else None, soon())


@contextlib.asynccontextmanager
async def store_kit(endpoint: str, mesh: str) -> AsyncIterator[Kit]:
    """Open a client on a mesh; its answers can be made to get lost."""
    async with LossyEtcd(EtcdConfig(endpoints=(endpoint,))) as etcd:
        yield Kit(etcd, mesh)


@contextlib.asynccontextmanager
async def background(*coroutines: Awaitable[None]) -> AsyncIterator[None]:
    """Run what never ends beside the body of a test."""

    async def run(coroutine: Awaitable[None]) -> None:
        await coroutine

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(coroutine)) for coroutine in coroutines]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


@contextlib.asynccontextmanager
async def mirrored(kit: Kit) -> AsyncIterator[Mirror]:
    """Run the kit's mirror."""
    async with background(kit.mirror.run()):
        await kit.mirror.loaded()
        yield kit.mirror


@contextlib.asynccontextmanager
async def holding(kit: Kit, config: HolderConfig | None = None, name: str = "h") -> AsyncIterator[Holder]:
    """Run a holder beside the kit's running mirror."""
    holder = Holder(kit.mirror, name, config)
    async with background(holder.run()):
        await holder.ready()
        yield holder


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for a condition that announces itself by no event."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)
