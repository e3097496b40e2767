"""The worker put together: hardware, sources, processes, the link to the registry, and the machine that decides."""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random, SystemRandom
from types import MappingProxyType
from typing import assert_never

from localmesh.core.clock import Clock, SystemClock
from localmesh.core.ids import ModelName, NodeName, ReplicaId
from localmesh.core.records import EngineInfo, MeasuredRecord, SourceRecord
from localmesh.rpc import convert
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.identity import worker_policy
from localmesh.rpc.server import GrpcServer, ServerConfig
from localmesh.v1 import registry_service_pb2 as pb
from localmesh.v1 import worker_service_pb2_grpc as pb_grpc
from localmesh.worker import engines, wire
from localmesh.worker.backend_service import BackendCalls
from localmesh.worker.backends import Backends
from localmesh.worker.config import WorkerConfig
from localmesh.worker.events import Event, ExitsTaken, Held, Registered, Report, ShutDown, Start, Stop, Ticked
from localmesh.worker.hardware import Device, GpuProbe, Hardware, NvmlProbe
from localmesh.worker.identity import NodeIdentity, certificate_identity, load_or_create
from localmesh.worker.link import RegistryLink
from localmesh.worker.logbook import LogBook
from localmesh.worker.machine import Machine
from localmesh.worker.runner import Runner
from localmesh.worker.service import SERVICE, WorkerServicer
from localmesh.worker.sources import CatalogItem, SourceBook

_log = logging.getLogger(__name__)
_TICK_SECONDS = 1.0
_SOURCES_SECONDS = 5.0
"""How often files are looked at for changes."""
_MEASURE_ANYWAY_SECONDS = 10.0
_CHANGE = 0.01


class Worker:
    """One node of the mesh.

    Args:
        config: How it is set up.
        clock: Time.
        gpu_probe: Where GPU facts come from.
        chance: Spreads attempts to reach the registry.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        clock: Clock | None = None,
        gpu_probe: GpuProbe | None = None,
        chance: Random | None = None,
    ) -> None:
        self._config = config
        self._clock = clock or SystemClock()
        self._chance = chance or SystemRandom()
        self._hardware = Hardware(
            gpu_probe=gpu_probe or NvmlProbe(),
            disk=config.models_dir,
            memory_budget=config.memory_budget,
            gpu_memory_budget=config.gpu_memory_budget,
        )
        self._machine = Machine(config.loads)
        self._runner = Runner(config, clock=self._clock, on_event=self._handle, gpu_bytes=self._hardware.gpu_bytes_of)
        self.backends = Backends(config, clock=self._clock, processes=self._runner, changed=self._look_at_backends)
        """The foreign backends of the node."""
        self._told = _Told()
        self._stopping = asyncio.Event()
        self._quiet = asyncio.Event()
        self._ready = asyncio.Event()
        self._link: RegistryLink | None = None
        self._facts = _Facts()
        self._registered_engines: tuple[EngineInfo, ...] = ()
        self._endpoint = ""

    @property
    def node(self) -> NodeName:
        """Name of the node."""
        return self._config.node

    @property
    def endpoint(self) -> str:
        """Address of the WorkerService; empty until it listens."""
        return self._endpoint

    @property
    def registered(self) -> bool:
        """Whether the node is surely registered at this moment."""
        return self._link is not None and self._link.registered

    def replicas(self) -> Iterable[Held]:
        """Return all that is known of the node's replicas."""
        return list(self._machine.held.values())

    @property
    def logs(self) -> LogBook:
        """What the node's replicas print."""
        return self._runner.logs

    def stop(self) -> None:
        """Have `run` end gracefully: replicas finish what runs, then the registration is ended."""
        self._stopping.set()

    async def listening(self) -> None:
        """Return when the WorkerService listens."""
        await self._ready.wait()

    async def run(self) -> None:
        """Work until `stop`. Cancelled, kill the replicas and return at once.

        Raises:
            ConfigError: The worker cannot run as it is configured.
            OSError: A folder cannot be used.
        """
        config = self._config
        for folder in (config.state_dir, config.cache_dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        await self._runner.open()
        try:
            await asyncio.to_thread(self.backends.folder.sweep)
            identity = _identity(config)
            await self._take_stock(identity)
            async with ChannelPool(config.tls, config.max_message_bytes, self._clock) as channels:
                server = self._server()
                await server.start()
                try:
                    await self._work(server, channels)
                finally:
                    await server.stop(0.0)
        finally:
            self._runner.close()

    def registration(self) -> pb.RegisterRequest:
        """See LinkHost."""
        now = self._clock.monotonic()
        self._registered_engines = self._facts.engines
        return pb.RegisterRequest(
            node=self._config.node,
            public_key=self._facts.public_key,
            facts=self._node_facts(),
            running=[wire.report(r) for r in self._machine.running(now=now)],
            join_token=self._config.join_token,
        )

    def registered_as(self, response: pb.RegisterResponse) -> None:
        """Take in the answer of a registration."""
        stop = frozenset(convert.replica_id(ref) for ref in response.stop)
        self._handle(Registered(incarnation=response.incarnation, stop=stop))

    def heartbeat(self, *, first: bool) -> pb.HeartbeatRequest:
        """See LinkHost."""
        now = self._clock.monotonic()
        if first:
            self._told = _Told()
            reports = self._machine.reports(now=now)
        else:
            due = self._told.dirty | self._machine.unsettled()
            reports = tuple(r for i in sorted(due) if (r := self._machine.report(i, now=now)) is not None)
            self._told.dirty.clear()
        message = pb.HeartbeatRequest(replicas=[wire.report(r) for r in reports])
        measured = self._facts.measured
        if measured is not None and self._told.measurement_is_due(measured, now):
            message.measurement.CopyFrom(wire.measurement(measured))
        for model, source in self._facts.sources.items():
            if self._told.sources.get(model) != source:
                message.sources.append(wire.source(model, source))
        self._told.sources = self._facts.sources
        if self._facts.engines != (self._told.engines or self._registered_engines):
            message.facts.CopyFrom(self._node_facts())
            self._told.engines = self._facts.engines
        return message

    def heard(self, response: pb.HeartbeatResponse) -> None:
        """See LinkHost."""
        if response.HasField("catalog"):
            self._facts.catalog = wire.catalog(response.catalog)
            self._facts.look_again.set()
        if response.HasField("wanted"):
            self._handle(wire.wanted_set(response.wanted))
        if response.exits_taken:
            self._handle(ExitsTaken(ids=frozenset(convert.replica_id(ref) for ref in response.exits_taken)))

    @property
    def _backends_dirs(self) -> tuple[Path, Path]:
        return self._config.installed_dir, self._config.backends_dir

    def _node_facts(self) -> pb.NodeFacts:
        return wire.node_facts(
            self._config,
            endpoint=self._endpoint,
            devices=self._facts.devices,
            engines=self._facts.engines,
            disk_total_bytes=self._facts.disk_total_bytes,
        )

    def _server(self) -> GrpcServer:
        config = self._config
        listen = ServerConfig(
            listen=config.listen,
            tls=config.tls,
            insecure=config.insecure,
            max_message_bytes=config.max_message_bytes,
            drain_seconds=config.drain_seconds,
            advertise=config.advertise,
        )
        server = GrpcServer(listen, name=f"worker {config.node}", identity_policy=worker_policy(config.mesh))
        backends = BackendCalls(
            config.node, self.backends, engines=lambda: self._facts.engines, upload_bytes=config.backend_bytes
        )
        server.add(pb_grpc.add_WorkerServiceServicer_to_server, WorkerServicer(self, backends), SERVICE)
        return server

    async def _take_stock(self, identity: NodeIdentity) -> None:
        facts = self._facts
        facts.public_key = identity.public_key
        facts.devices = await asyncio.to_thread(self._hardware.devices)
        facts.disk_total_bytes = await asyncio.to_thread(self._hardware.disk_total_bytes)
        facts.measured = await asyncio.to_thread(self._hardware.measure)
        facts.engines = await engines.probe(
            *self._backends_dirs,
            gpus=any(d.kind == "gpu" for d in facts.devices),
            environment=self._config.environment,
        )

    async def _work(self, server: GrpcServer, channels: ChannelPool) -> None:
        self._endpoint = server.endpoint
        link = RegistryLink(self._config, host=_Host(self), channels=channels, clock=self._clock, chance=self._chance)
        self._link = link
        ended = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._runner.run(ended), name="runner")
            group.create_task(self.backends.run(self._stopping), name="backends")
            keepers = [
                group.create_task(link.run(), name="link"),
                group.create_task(self._measure(), name="measuring"),
                group.create_task(self._look_at_sources(), name="sources"),
                group.create_task(self._tick(), name="ticks"),
            ]
            self._ready.set()
            await self._stopping.wait()
            # the link lives on meanwhile: the registry sees each replica go
            self._handle(ShutDown())
            await self._quiet.wait()
            for keeper in keepers:
                keeper.cancel()
            ended.set()
        await link.deregister()

    def _handle(self, event: Event) -> None:
        """Feed the machine and do what it says. Never waits, so events are taken one by one."""
        for command in self._machine.handle(event, now=self._clock.monotonic()):
            match command:
                case Start():
                    self._runner.start(command)
                case Stop():
                    self._runner.stop(command)
                case Report(id=replica):
                    self._told.dirty.add(replica)
                    if self._link is not None:
                        self._link.nudge()
                case _:
                    assert_never(command)
        if self._machine.idle:
            self._quiet.set()
        else:
            self._quiet.clear()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            self._handle(Ticked())

    async def _measure(self) -> None:
        while True:
            try:
                self._facts.measured = await asyncio.to_thread(self._hardware.measure)
            except Exception as error:  # noqa: BLE001 - a broken driver or /proc must not end the replicas
                _log.warning("cannot measure this node: %r", error)
            await asyncio.sleep(self._config.heartbeat_seconds)

    async def _look_at_sources(self) -> None:
        book = SourceBook(self._config.models_dir)
        facts = self._facts
        while True:
            facts.look_again.clear()
            await self._look_at_backends()
            try:
                found = await asyncio.to_thread(book.look, facts.catalog)
            except Exception:  # noqa: BLE001 - no file or package, however broken, may end the replicas
                _log.exception("cannot look at the models' files")
            else:
                if found != facts.sources:
                    facts.sources = found
                    if self._link is not None:
                        self._link.nudge()
            try:
                async with asyncio.timeout(_SOURCES_SECONDS):
                    await facts.look_again.wait()
            except TimeoutError:
                continue

    async def _look_at_backends(self) -> None:
        """Tell the registry of foreign backends that came or went, also of those put there by hand."""
        facts = self._facts
        gpus = any(device.kind == "gpu" for device in facts.devices)
        found = await asyncio.to_thread(engines.process_engines, *self._backends_dirs, gpus=gpus)
        known = engines.with_process_engines(facts.engines, found)
        if known != facts.engines:
            facts.engines = known
            if self._link is not None:
                self._link.nudge()


class _Facts:
    """What is known of the node, apart from its replicas."""

    def __init__(self) -> None:
        self.public_key = b""
        self.devices: tuple[Device, ...] = ()
        self.engines: tuple[EngineInfo, ...] = ()
        self.disk_total_bytes = 0
        self.measured: MeasuredRecord | None = None
        self.catalog: tuple[CatalogItem, ...] = ()
        self.sources: Mapping[ModelName, SourceRecord] = MappingProxyType({})
        self.look_again = asyncio.Event()


class _Told:
    """What the registry was told on the present stream."""

    def __init__(self) -> None:
        self.dirty: set[ReplicaId] = set()
        self.sources: Mapping[ModelName, SourceRecord] = MappingProxyType({})
        self.engines: tuple[EngineInfo, ...] = ()
        """Empty while they are those of the registration."""
        self._measured: MeasuredRecord | None = None
        self._measured_at = 0.0

    def measurement_is_due(self, value: MeasuredRecord, now: float) -> bool:
        """Whether a measurement is to be sent; it counts as sent then."""
        last = self._measured
        due = last is None or now - self._measured_at >= _MEASURE_ANYWAY_SECONDS or differs(last, value)
        if due:
            self._measured, self._measured_at = value, now
        return due


class _Host:
    """The worker as its link sees it."""

    def __init__(self, worker: Worker) -> None:
        self.registration = worker.registration
        self.registered = worker.registered_as
        self.heartbeat = worker.heartbeat
        self.heard = worker.heard


def differs(last: MeasuredRecord, now: MeasuredRecord) -> bool:
    """Whether two measurements differ by more than noise: a hundredth of a value, or a device."""
    if last.free_bytes.keys() != now.free_bytes.keys():
        return True
    pairs = [(last.free_bytes[d], now.free_bytes[d]) for d in now.free_bytes]
    pairs.append((last.disk_free_bytes, now.disk_free_bytes))
    return any(abs(a - b) > _CHANGE * max(a, b) for a, b in pairs) or abs(last.cpu_load - now.cpu_load) > 0.05


def _identity(config: WorkerConfig) -> NodeIdentity:
    if config.tls is not None:
        return certificate_identity(Path(config.tls.cert), Path(config.tls.key))
    return load_or_create(config.state_dir)
