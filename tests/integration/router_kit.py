"""Nodes and replicas for the router's tests: real records in a real etcd, real gRPC servers, and no engine."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc

from localmesh.core.clock import SystemClock
from localmesh.core.errors import Conflict, ReplicaDraining, ReplicaFull, ReplicaStale
from localmesh.core.ids import CPU, ModelName, NodeName, ReplicaId
from localmesh.core.records import (
    EngineInfo,
    FailureRecord,
    ModelSpec,
    Policy,
    ReplicaRecord,
    ReplicaState,
    SourceRecord,
)
from localmesh.core.snapshot import Snapshot
from localmesh.etcd import EtcdClient, EtcdConfig
from localmesh.router.config import RouterConfig
from localmesh.router.node import Router
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.metadata import MODEL, REPLICA, REVISION, SERVED_BY_REPLICA, first
from localmesh.rpc.server import GrpcServer, ServerConfig
from localmesh.rpc.tls import TlsFiles
from localmesh.scheduling.failures import FailurePolicy
from localmesh.store.holder import Holder, HolderConfig
from localmesh.store.leader import LeaderElection
from localmesh.store.membership import LeaseTimes
from localmesh.store.mesh import MeshStore
from localmesh.store.mirror import Mirror
from localmesh.store.registration import DeviceFacts, Registered, Registration, RunningReplica

MIB = 1 << 20
CLOCK = SystemClock()


class FakeReplica(grpc.GenericRpcHandler):  # type: ignore[misc]
    """A replica that echoes bytes: any method, and refuses what a replica refuses."""

    def __init__(
        self, replica: ReplicaId, revision: str, *, limit: int, gate: asyncio.Event, tls: TlsFiles | None = None
    ) -> None:
        self.id = replica
        self.revision = revision
        self.limit = limit
        self.draining = False
        self.running = 0
        self.served = 0
        self.refused = 0
        self.most = 0
        self._gate = gate
        config = ServerConfig(drain_seconds=2.0, tls=tls)
        self._server = GrpcServer(config, name=str(replica), generic_handlers=[self])

    @property
    def endpoint(self) -> str:
        return self._server.endpoint

    async def start(self) -> None:
        await self._server.start()

    async def stop(self, grace: float = 0.0) -> None:
        await self._server.stop(grace)

    def service(self, details: Any) -> Any:
        """Serve every method, in the way that its name says."""
        kinds: dict[str, tuple[Any, Any]] = {
            "ServerStream": (grpc.unary_stream_rpc_method_handler, self._server_stream),
            "ClientStream": (grpc.stream_unary_rpc_method_handler, self._client_stream),
            "Both": (grpc.stream_stream_rpc_method_handler, self._both),
        }
        name = details.method.rsplit("/", 1)[-1]
        make, behaviour = kinds.get(name, (grpc.unary_unary_rpc_method_handler, self._unary))
        return make(behaviour)

    @contextlib.asynccontextmanager
    async def _call(self, context: Any) -> AsyncIterator[None]:
        metadata = context.invocation_metadata()
        if first(metadata, REPLICA) not in ("", str(self.id)) or first(metadata, REVISION) not in ("", self.revision):
            self.refused += 1
            raise ReplicaStale("another replica lives here", replica=self.id)
        if self.draining:
            self.refused += 1
            raise ReplicaDraining("it stops", replica=self.id)
        if self.running >= self.limit:
            self.refused += 1
            raise ReplicaFull("it is full", replica=self.id, limit=self.limit)
        self.running += 1
        self.served += 1
        self.most = max(self.most, self.running)
        context.set_trailing_metadata(((SERVED_BY_REPLICA, str(self.id)),))
        try:
            yield
        finally:
            self.running -= 1

    async def _unary(self, request: bytes, context: Any) -> bytes:
        async with self._call(context):
            await self._gate.wait()
            return request

    async def _server_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        async with self._call(context):
            yield request
            await self._gate.wait()
            yield request

    async def _client_stream(self, requests: Any, context: Any) -> bytes:
        async with self._call(context):
            received = [r async for r in requests]
            await self._gate.wait()
            return b"".join(received)

    async def _both(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        async with self._call(context):
            async for request in requests:
                await self._gate.wait()
                yield request


class FakeNode:
    """What a worker and its registry do for one node: register, renew, and drive replicas to where they are wanted."""

    def __init__(
        self,
        store: MeshStore,
        mirror: Mirror,
        name: str,
        *,
        memory_mib: int = 1000,
        limit: int = 4,
        max_replicas_per_model: int = 1,
        endpoint: str = "127.0.0.1:1",
        presence_seconds: int = 2,
        lacks: tuple[str, ...] = (),
        tls: TlsFiles | None = None,
    ) -> None:
        self.name = NodeName(name)
        self.replicas: dict[ReplicaId, FakeReplica] = {}
        self.loads: Counter[str] = Counter()
        self.open_gate = asyncio.Event()
        self.open_gate.set()
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.fails: dict[str, str] = {}
        """Words with which the load of a model fails here."""
        self._store = store
        self._mirror = mirror
        self._memory_mib = memory_mib
        self._limit = limit
        self._max_replicas_per_model = max_replicas_per_model
        self._endpoint = endpoint
        self._presence_seconds = presence_seconds
        self._lacks = lacks
        self._tls = tls
        self._told: dict[ModelName, str] = {}
        self._handled: set[tuple[ReplicaId, int, ReplicaState]] = set()
        self._registered: Registered | None = None

    async def register(self) -> None:
        self._registered = await self._store.register(
            Registration(
                node=self.name,
                key_fingerprint=f"key-of-{self.name}",
                endpoint=self._endpoint,
                devices=(
                    DeviceFacts(
                        id=CPU, kind="cpu", total_bytes=self._memory_mib * MIB, budget_bytes=self._memory_mib * MIB
                    ),
                ),
                engines=(EngineInfo(name="llama", available=True),),
                max_replicas_per_model=self._max_replicas_per_model,
                running=tuple(self._running(fake) for fake in self.replicas.values()),
                auto_approve=True,
            ),
            LeaseTimes(presence_seconds=self._presence_seconds, record_seconds=60),
        )

    def _running(self, fake: FakeReplica) -> RunningReplica:
        record = self._mirror.snapshot.replica(fake.id)
        return RunningReplica(
            id=fake.id,
            revision=fake.revision,
            state=ReplicaState.READY,
            endpoint=fake.endpoint,
            limit=fake.limit,
            devices=record.devices if record is not None else {},
        )

    async def fall_silent(self) -> None:
        """Lose the presence, as when nobody renews it for its time; replicas go on. `register` ends it."""
        assert self._registered is not None
        await self._store.revoke(self._registered.incarnation)

    async def run(self) -> None:
        """Live until cancelled. Being cancelled is being killed: nothing is said to anybody."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._renew())
                async for snapshot in self._mirror.changes():
                    await self._tell_sources(snapshot)
                    for replica in list(snapshot.all_replicas()):
                        self._drive(replica, tasks)
        finally:
            for replica in self.replicas.values():
                await replica.stop()

    async def _renew(self) -> None:
        assert self._registered is not None
        while True:
            await asyncio.sleep(self._presence_seconds / 4)
            with contextlib.suppress(Exception):  # the store may be away: that is tested
                await self._store.renew(self.name, self._registered.incarnation, self._registered.record_lease)

    async def _tell_sources(self, snapshot: Snapshot) -> None:
        assert self._registered is not None
        wanted = {name: record.revision for name, record in snapshot.models.items()}
        if wanted == self._told or self.name not in snapshot.nodes:
            return
        facts: Mapping[ModelName, SourceRecord] = {
            name: SourceRecord(
                revision=revision,
                present=name not in self._lacks,
                path=f"/models/{name}.gguf",
                memory_bytes=snapshot.models[name].spec.memory_bytes or 100 * MIB,
            )
            for name, revision in wanted.items()
        }
        await self._store.put_sources(self.name, self._registered.incarnation, facts)
        self._told = wanted

    def _drive(self, replica: ReplicaRecord, tasks: asyncio.TaskGroup) -> None:
        assert self._registered is not None
        if replica.id.node != self.name or replica.incarnation != self._registered.incarnation:
            return
        step = (replica.id, replica.create_revision, replica.state)
        if step in self._handled:
            return
        self._handled.add(step)
        if replica.state is ReplicaState.PLACED:
            tasks.create_task(self._load(replica))
        elif replica.state is ReplicaState.UNLOADING:
            tasks.create_task(self._unload(replica))

    async def _load(self, replica: ReplicaRecord) -> None:
        self.loads[replica.id.model] += 1
        with contextlib.suppress(Conflict):
            replica = await self._store.report(replica, state=ReplicaState.LOADING)
            await self.may_load.wait()
            words = self.fails.get(replica.id.model)
            if words is not None:
                failure = FailureRecord(
                    model=replica.id.model,
                    node=self.name,
                    reason="LOAD_FAILED",
                    message=words,
                    revision=replica.revision,
                )
                await self._store.exited(replica, failure=failure, policy=FailurePolicy(first_seconds=5))
                return
            fake = FakeReplica(replica.id, replica.revision, limit=self._limit, gate=self.open_gate, tls=self._tls)
            await fake.start()
            self.replicas[replica.id] = fake
            await self._store.report(
                replica, state=ReplicaState.READY, endpoint=fake.endpoint, limit=self._limit, measured={}
            )

    async def _unload(self, replica: ReplicaRecord) -> None:
        fake = self.replicas.pop(replica.id, None)
        if fake is not None:
            await fake.stop(1.0)
        await self._store.exited(replica)

    async def exit_of(self, replica: ReplicaId) -> None:
        """Report that a replica's process is gone, as a worker does that has seen it die."""
        self.replicas.pop(replica, None)
        record = self._mirror.snapshot.replica(replica)
        if record is not None:
            await self._store.exited(record)


class Tasks:
    """Runs coroutines for a test, and ends them one by one or all together."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: list[asyncio.Task[Any]] = []

    def start(self, coroutine: Any) -> asyncio.Task[Any]:
        task = self._group.create_task(coroutine)
        self._tasks.append(task)
        return task

    async def kill(self, task: asyncio.Task[Any]) -> None:
        task.cancel()
        await asyncio.wait([task])

    async def end(self) -> None:
        for task in reversed(self._tasks):
            if not task.done():
                await self.kill(task)


async def declare(store: MeshStore, name: str, policy: Policy | None = None, **spec: Any) -> ModelName:
    """Declare a model that any node with the engine can load."""
    model = ModelName(name)
    await store.put_model(ModelSpec(name=model, backend="llama", source=f"{name}.gguf", **spec), policy)
    return model


async def eventually(mirror: Mirror, condition: Callable[[Snapshot], object], *, within: float = 15.0) -> Snapshot:
    """Wait until the view of the mesh is as wanted."""
    deadline = asyncio.get_running_loop().time() + within
    try:
        return await mirror.wait_for(lambda s: s if condition(s) else None, deadline)
    except TimeoutError:
        raise AssertionError(f"the mesh did not come to be as wanted: {mirror.snapshot}") from None


def ready(snapshot: Snapshot, model: str) -> list[ReplicaRecord]:
    """Return the replicas of a model that serve."""
    return [r for r in snapshot.replicas_of(ModelName(model)) if r.state is ReplicaState.READY and snapshot.present(r)]


def unary(channel: Any, method: str = "/test.Echo/Unary") -> Any:
    """Return a callable for a method, without any stub."""
    return channel.unary_unary(method)


class RouterMesh:
    """A mesh under test: store and view are real, nodes are fake, routers are real."""

    def __init__(self, store: MeshStore, mirror: Mirror, tasks: Tasks) -> None:
        self.store = store
        self.mirror = mirror
        self.channels = ChannelPool()
        """The callers' channels."""
        self.channels_of: dict[Router, ChannelPool] = {}
        """Each router's own."""
        self._tasks = tasks
        self._node_tasks: dict[str, asyncio.Task[Any]] = {}
        self._router_tasks: dict[Router, asyncio.Task[Any]] = {}

    async def node(self, name: str, **settings: Any) -> FakeNode:
        """Add a node and wait until it is there."""
        node = FakeNode(self.store, self.mirror, name, **settings)
        await node.register()
        self._node_tasks[name] = self._tasks.start(node.run())
        await eventually(self.mirror, lambda s: node.name in s.nodes)
        return node

    async def kill_node(self, node: FakeNode) -> None:
        """End a node and its replicas, without a word to anybody."""
        await self._tasks.kill(self._node_tasks[node.name])

    async def router(
        self, name: str = "router", *, ttl_seconds: int = 2, tls: TlsFiles | None = None, **settings: Any
    ) -> Router:
        """Add a router, with a view and a holder of its own, and wait until it serves."""
        settings.setdefault("reconcile_interval_seconds", 0.2)
        settings.setdefault("health_interval_seconds", 0.05)
        config = RouterConfig(
            mesh=self.store.keys.mesh,
            name=name,
            server=ServerConfig(drain_seconds=1.0, tls=tls),
            version="test",
            **settings,
        )
        channels = ChannelPool(tls)
        mirror = Mirror(self.store)
        holder = Holder(mirror, name, HolderConfig(ttl_seconds=2, linger_seconds=0.3, patience_seconds=0.5))
        router = Router(
            config,
            store=self.store,
            mirror=mirror,
            holder=holder,
            election=LeaderElection(self.store, name, ttl_seconds=ttl_seconds),
            channels=channels,
            clock=CLOCK,
        )

        async def run() -> None:
            async with channels, asyncio.TaskGroup() as parts:
                parts.create_task(mirror.run())
                parts.create_task(holder.run())
                await router.run()

        self._router_tasks[router] = self._tasks.start(run())
        self.channels_of[router] = channels
        async with asyncio.timeout(10):
            await router.started.wait()
            await mirror.loaded()
        return router

    async def stop_router(self, router: Router) -> None:
        """Stop a router as SIGTERM does: what runs may end, for a second."""
        await self._tasks.kill(self._router_tasks[router])

    def channel(self, router: Router) -> Any:
        """Return a channel to a router."""
        return self.channels.get(router.endpoint)

    async def call(self, router: Router, model: str, message: bytes = b"x", *, timeout: float = 10.0) -> str:
        """Call a model once, and return the replica that has served it."""
        call = unary(self.channel(router))(message, metadata=((MODEL, model),), timeout=timeout)
        assert await call == message
        return first(await call.trailing_metadata(), SERVED_BY_REPLICA)

    async def inflight_keys(self, model: str) -> int:
        """Return how many presences are in the store for a model."""
        found = await self.store.etcd.get_prefix(self.store.keys.prefix + f"inflight/{model}/".encode())
        return len(found.kvs)


@contextlib.asynccontextmanager
async def router_mesh(endpoint: str, name: str) -> AsyncIterator[RouterMesh]:
    """Yield an empty mesh in a real etcd; end all that the test has started in it."""
    async with EtcdClient(EtcdConfig(endpoints=(endpoint,)), CLOCK) as etcd:
        store = MeshStore(etcd, name, CLOCK)
        await store.check_schema()
        async with asyncio.TaskGroup() as group:
            tasks = Tasks(group)
            mirror = Mirror(store)
            tasks.start(mirror.run())
            mesh = RouterMesh(store, mirror, tasks)
            try:
                await mirror.loaded()
                yield mesh
            finally:
                await tasks.end()
                await mesh.channels.close()
