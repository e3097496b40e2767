"""A router, put together."""

import asyncio
import logging
import random
from collections.abc import Coroutine
from typing import Any

from localmesh.balancing import Chooser, Ejections, LocalLoad
from localmesh.core.clock import Clock
from localmesh.core.errors import ComponentUnreachable, MeshError
from localmesh.core.ids import ModelName, ReplicaId
from localmesh.core.snapshot import Snapshot
from localmesh.router.backends import BackendRelay
from localmesh.router.calls import CallRouter, known_kinds
from localmesh.router.cold import ColdLoader
from localmesh.router.config import RouterConfig
from localmesh.router.dispatch import Dispatcher
from localmesh.router.health import ModelHealth
from localmesh.router.logs import LogRelay
from localmesh.router.naming import FORWARDED_SERVICES
from localmesh.router.placer import Placer
from localmesh.router.reconciler import Reconciler
from localmesh.router.room import RoomMaker
from localmesh.router.routing import Routing
from localmesh.router.service import RouterServicer
from localmesh.router.usage import UsageLog
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.identity import router_policy
from localmesh.rpc.proxy import ProxyHandler
from localmesh.rpc.server import GrpcServer
from localmesh.store.holder import Holder
from localmesh.store.leader import LeaderElection
from localmesh.store.mesh import MeshStore
from localmesh.store.mirror import Mirror
from localmesh.v1 import router_service_pb2_grpc

logger = logging.getLogger(__name__)

ROUTER_SERVICE = "localmesh.v1.RouterService"


class Router:
    """One router: its server and its tasks.

    Whoever makes it also runs and closes what it is given: mirror, holder and channels. The channels are its own: it
    closes those to replicas that are gone, and would cancel what others do with them.

    Args:
        config: Settings.
        store: The transactions.
        mirror: The view of the mesh.
        holder: The locks of this process.
        election: Who reconciles.
        channels: To replicas and workers.
        clock: The time.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        store: MeshStore,
        mirror: Mirror,
        holder: Holder,
        election: LeaderElection,
        channels: ChannelPool,
        clock: Clock,
    ) -> None:
        self.started = asyncio.Event()
        self._config = config
        self._mirror = mirror
        self._channels = channels
        self._tasks: asyncio.TaskGroup | None = None
        self._endpoints: dict[str, ReplicaId] = {}
        placer = Placer(store, mirror, clock)
        self._load = LocalLoad()
        self._dispatcher = self._make_dispatcher(holder, clock)
        self._usage = UsageLog(clock, waiting=self._dispatcher.waiting, in_flight=self._load.in_flight)
        self._cold = ColdLoader(
            mirror=mirror,
            placer=placer,
            room=RoomMaker(store, mirror, self._usage, clock),
            clock=clock,
            spawn=self._spawn,
            patience_seconds=config.hold_seconds,
            return_seconds=config.return_seconds,
            lost=self._dispatcher.ejected,
            failed=self._dispatcher.fail,
        )
        self._reconciler = Reconciler(
            store=store,
            mirror=mirror,
            placer=placer,
            election=election,
            clock=clock,
            config=config.reconcile,
            interval_seconds=config.reconcile_interval_seconds,
            waiting=self._dispatcher.queues,
        )
        servicer = RouterServicer(
            config,
            store,
            mirror,
            clock,
            self._cold,
            LogRelay(mirror, channels, clock),
            BackendRelay(mirror, channels),
            self._reconciler.worries,
        )
        self.server = self._make_server(self._make_calls(holder, clock), servicer, clock)
        self._health = ModelHealth(
            self.server.health,
            mirror,
            clock,
            services=(ROUTER_SERVICE, *FORWARDED_SERVICES),
            interval_seconds=config.health_interval_seconds,
        )

    def _make_calls(self, holder: Holder, clock: Clock) -> CallRouter:
        routing = Routing(
            mirror=self._mirror,
            holder=holder,
            dispatcher=self._dispatcher,
            clock=clock,
            hold_seconds=self._config.hold_seconds,
            short_of=self._cold.short_of,
        )
        return CallRouter(
            routing=routing,
            dispatcher=self._dispatcher,
            channels=self._channels,
            retry=self._config.retry,
            clock=clock,
        )

    def _make_server(self, calls: CallRouter, servicer: RouterServicer, clock: Clock) -> GrpcServer:
        server = GrpcServer(
            self._config.server,
            name=f"router {self._config.name}",
            identity_policy=router_policy(self._config.mesh),
            generic_handlers=[ProxyHandler(calls.route, clock=clock, kinds=known_kinds())],
        )
        server.add(router_service_pb2_grpc.add_RouterServiceServicer_to_server, servicer, ROUTER_SERVICE)
        for service in FORWARDED_SERVICES:
            server.announce(service)
        return server

    def _make_dispatcher(self, holder: Holder, clock: Clock) -> Dispatcher:
        ejections = Ejections()
        return Dispatcher(
            snapshot=lambda: self._mirror.snapshot,
            chooser=Chooser(
                holder=holder.holder_id,
                load=self._load,
                ejections=ejections,
                salt=holder.holder_id.encode(),
                # Balances load, guards nothing; the seed makes routers differ.
                dice=random.Random(holder.holder_id),  # noqa: S311
                many_holders=self._config.many_holders,
            ),
            load=self._load,
            ejections=ejections,
            clock=clock,
            need=self._need,
            max_waiting=self._config.max_waiting_per_model,
        )

    @property
    def endpoint(self) -> str:
        """The address that callers use, once `started`."""
        return self.server.endpoint

    @property
    def in_flight(self) -> int:
        """Requests that have a replica now."""
        return self._dispatcher.in_flight

    def waiting(self, model: ModelName) -> int:
        """Return how many requests wait for a replica of the model."""
        return self._dispatcher.waiting(model)

    def short_of(self, model: ModelName) -> MeshError | None:
        """Return what the load of a model waits for; None if it waits for nothing, or nothing is loaded."""
        return self._cold.short_of(model)

    async def run(self) -> None:
        """Serve until cancelled; then stop gracefully.

        Raises:
            ListenFailed: The address cannot be listened on.
        """
        await self.server.start(serving=False)
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            try:
                tasks.create_task(self._health.run())
                tasks.create_task(self._follow())
                tasks.create_task(self._reconciler.run())
                self.started.set()
                await asyncio.Event().wait()  # until cancelled
            finally:
                # Before the tasks end: calls that are still running may be waiting for a load.
                await self.server.stop()
                self._tasks = None
                self._dispatcher.close()

    async def _follow(self) -> None:
        replicas: object = None
        async for snapshot in self._mirror.changes():
            self._usage.observe(snapshot)
            self._dispatcher.pump_all()
            if snapshot.replicas is not replicas:
                replicas = snapshot.replicas
                self._dispatcher.forget_gone()
                await self._close_channels(snapshot)

    async def _close_channels(self, snapshot: Snapshot) -> None:
        """Close the channels to replicas that are gone, once nothing of ours runs there."""
        present = {replica.endpoint: replica.id for replica in snapshot.all_replicas() if replica.endpoint}
        gone = {endpoint: replica for endpoint, replica in self._endpoints.items() if endpoint not in present}
        self._endpoints = gone | present
        for endpoint, replica in gone.items():
            # Looked at in the step in which it is closed: closing a channel under a call would cancel the call.
            if not self._load.in_flight(replica):
                del self._endpoints[endpoint]
                await self._channels.release(endpoint)

    def _need(self, model: ModelName) -> None:
        try:
            self._cold.want(model)
        except MeshError as error:
            self._dispatcher.fail(model, error)

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        if self._tasks is None:
            coroutine.close()
            raise ComponentUnreachable("this router is stopping: ask another one", endpoint="")
        self._tasks.create_task(coroutine, name=name)
