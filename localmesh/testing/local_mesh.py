"""A whole mesh on loopback, in real processes, with handles to break each of them."""

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar

import grpc

from localmesh.app.children import Child
from localmesh.app.config import Config
from localmesh.app.config_reader import read
from localmesh.app.household import Household
from localmesh.core.clock import Clock, SystemClock
from localmesh.core.ids import ReplicaId
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.metadata import MODEL
from localmesh.testing.sample_models import MODELS_FOLDER
from localmesh.v1 import (
    inference_service_pb2_grpc,
    registry_service_pb2,
    registry_service_pb2_grpc,
    router_service_pb2_grpc,
    types_pb2,
    worker_service_pb2,
    worker_service_pb2_grpc,
)

T = TypeVar("T")

_POLL_SECONDS = 0.05


class LocalMesh:
    """Etcd, registry, router and workers as child processes of this one, on free ports of loopback.

    An async context manager: entered, everything serves; left, nothing is left of it, no process, port or file. What is
    killed is started again, as by `localmesh up`.
    """

    def __init__(
        self,
        *,
        nodes: Sequence[str] = ("alpha", "beta"),
        models_dir: Path = MODELS_FOLDER,
        durable: bool = False,
        settings: Mapping[str, object] = MappingProxyType({}),
        environment: Mapping[str, str] = MappingProxyType({}),
        say: Callable[[str], None] = lambda _: None,
        clock: Clock | None = None,
    ) -> None:
        """Prepare a mesh.

        Args:
            nodes: Names of the nodes, a worker each.
            models_dir: Where the models' files are.
            durable: Let etcd keep its data over a crash, where the binary is fit for it.
            settings: More settings by option key, as in localmesh.app.config.
            environment: LOCALMESH_* variables to respect, such as LOCALMESH_ETCD_BIN; all others are not looked at.
            say: Told a sentence when a process is started again.
            clock: Time.
        """
        self._nodes = tuple(nodes)
        self._models_dir = models_dir
        self._durable = durable
        self._settings = settings
        self._environment = environment
        self._say = say
        self._clock = clock or SystemClock()
        self._folder: Path | None = None
        self._household: Household | None = None
        self._pool: ChannelPool | None = None

    @property
    def household(self) -> Household:
        """The processes."""
        if self._household is None:
            raise RuntimeError("the mesh is not entered")
        return self._household

    @property
    def folder(self) -> Path:
        """Its state folder: with `--state-dir` commands find this mesh."""
        return self.household.config.state_dir

    @property
    def router_endpoint(self) -> str:
        """Address of the router."""
        return _address(self.household.router)

    @property
    def registry_endpoint(self) -> str:
        """Address of the registry."""
        return _address(self.household.registry)

    @property
    def etcd_endpoint(self) -> str:
        """Address of etcd."""
        return self.household.etcd_endpoints[0]

    @property
    def registry(self) -> Any:
        """Stub of RegistryService."""
        return registry_service_pb2_grpc.RegistryServiceStub(self.channel(self.registry_endpoint))

    @property
    def router(self) -> Any:
        """Stub of RouterService."""
        return router_service_pb2_grpc.RouterServiceStub(self.channel(self.router_endpoint))

    @property
    def inference(self) -> Any:
        """Stub of InferenceService, through the router: name the model by `for_model`."""
        return inference_service_pb2_grpc.InferenceServiceStub(self.channel(self.router_endpoint))

    def channel(self, endpoint: str) -> Any:
        """Return a grpc.aio.Channel, shared and closed with the mesh."""
        if self._pool is None:
            raise RuntimeError("the mesh is not entered")
        return self._pool.get(endpoint)

    async def __aenter__(self) -> Self:
        """Start it.

        Raises:
            StartFailed: It does not start.
        """
        # Below /tmp and not below a test's folder: paths of unix sockets must be short.
        self._folder = Path(tempfile.mkdtemp(prefix="localmesh-"))
        self._pool = ChannelPool()
        try:
            household = Household(
                self._config(self._folder),
                say=self._say,
                throw_away_etcd=not self._durable,
                node_names=self._nodes,
                clock=self._clock,
            )
            self._household = household
            await household.__aenter__()
        except BaseException:
            await self._clean_up()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it and remove its files."""
        await self._clean_up()

    async def _clean_up(self) -> None:
        if self._pool is not None:
            await self._pool.close()
        if self._household is not None:
            for child in self._household.children:
                self._signal(child.pid, signal.SIGCONT)
            if self._household.etcd is not None:
                self._signal(self._household.etcd.pid, signal.SIGCONT)
            await self._household.stop()
        if self._folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    def _config(self, folder: Path) -> Config:
        settings: dict[str, object] = {
            "mesh": "test",
            "state_dir": folder,
            "models_dir": self._models_dir,
            "registry.listen": "127.0.0.1:0",
            "router.listen": "127.0.0.1:0",
            "up.workers": len(self._nodes),
            "drain_seconds": 5,
            "worker.served_by": "on",
        }
        flags = {key: str(value) for key, value in (settings | dict(self._settings)).items()}
        return read(flags, environment=self._environment).config

    # Breaking things.

    def pid(self, name: str) -> int:
        """Return the process of "etcd", "registry", "router" or a node; 0 between two lives.

        Raises:
            KeyError: There is no such component.
        """
        if name == "etcd" and self.household.etcd is not None:
            return self.household.etcd.pid
        return self._child(name).pid

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a component: SIGKILL by default."""
        self._signal(self.pid(name), number)

    def pause(self, name: str) -> None:
        """Freeze a component (SIGSTOP): it keeps its connections and does not answer."""
        self.kill(name, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """Let a frozen component go on."""
        self.kill(name, signal.SIGCONT)

    async def replica_pid(self, replica: ReplicaId) -> int:
        """Return the process of a replica, as its worker tells it.

        Raises:
            KeyError: The worker runs no such replica.
        """
        worker = self._child(replica.node)
        stub: Any = worker_service_pb2_grpc.WorkerServiceStub(self.channel(_address(worker)))
        answer = await stub.ListProcesses(worker_service_pb2.ListProcessesRequest(), timeout=10)
        for process in answer.processes:
            if process.ref.model == replica.model and process.ref.index == replica.index:
                return int(process.pid)
        raise KeyError(str(replica))

    async def kill_replica(self, replica: ReplicaId, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a replica's process: SIGKILL by default. Return the process.

        Raises:
            KeyError: The worker runs no such replica.
        """
        pid = await self.replica_pid(replica)
        self._signal(pid, number)
        return pid

    def starts(self, name: str) -> int:
        """Return how often a component was started."""
        if name == "etcd" and self.household.etcd is not None:
            return self.household.etcd.starts
        return self._child(name).starts

    async def restarted(self, name: str, *, after: int, seconds: float = 30.0) -> None:
        """Wait until a component was started more than `after` times and serves again."""

        async def again() -> bool:
            return self.starts(name) > after and (name == "etcd" or self._child(name).ready.is_set())

        await self.until(again, seconds=seconds)

    # Asking and waiting.

    async def apply(self, spec: types_pb2.ModelSpec, *, min_replicas: int = 0, max_replicas: int = 0) -> None:
        """Declare a model."""
        policy = types_pb2.PlacementPolicy(min_replicas=min_replicas, max_replicas=max_replicas)
        request = registry_service_pb2.ApplyModelRequest(spec=spec, policy=policy)
        await self.registry.ApplyModel(request, timeout=10)

    async def replicas(self, model: str = "") -> list[types_pb2.Replica]:
        """Return the replicas as the registry sees them."""
        request = registry_service_pb2.ListReplicasRequest(model=model, page_size=1000)
        return list((await self.registry.ListReplicas(request, timeout=10)).replicas)

    async def routable(self, model: str, count: int = 1, *, seconds: float = 60.0) -> list[types_pb2.Replica]:
        """Wait until a model has that many routable replicas, and return them."""

        async def enough() -> list[types_pb2.Replica]:
            found = [r for r in await self.replicas(model) if r.routable]
            return found if len(found) >= count else []

        return await self.until(enough, seconds=seconds)

    async def until(self, condition: Callable[[], Awaitable[T]], *, seconds: float = 30.0) -> T:
        """Wait until a condition returns something true, and return that. A call that fails counts as false.

        Raises:
            TimeoutError: It has not in time; the message has the last failure.
        """
        deadline = self._clock.monotonic() + seconds
        last: object = None
        while True:
            try:
                result = await condition()
            except grpc.RpcError as error:
                last = error
            else:
                if result:
                    return result
                last = result
            if self._clock.monotonic() > deadline:
                raise TimeoutError(f"still not so after {seconds:.0f} s; the last answer was {last!r}")
            await asyncio.sleep(_POLL_SECONDS)

    def log(self, name: str) -> str:
        """Return a component's output."""
        return (self.household.log_dir / f"{self._child(name).spec.name}.log").read_text(errors="replace")

    def _child(self, name: str) -> Child:
        for child in self.household.children:
            if name in (child.spec.name, child.spec.config.worker.name if child.spec.role == "worker" else ""):
                return child
        raise KeyError(name)

    @staticmethod
    def _signal(pid: int, number: signal.Signals) -> None:
        if pid:
            os.kill(pid, number)


def for_model(model: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata that names a call's model."""
    return ((MODEL, model),)


def _address(child: Child | None) -> str:
    if child is None or child.address is None:
        raise RuntimeError("the component has never served")
    return child.address.endpoint
