"""A mesh to break, and traffic that goes on meanwhile."""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from localmesh.rpc.errors import reason_of
from localmesh.testing import LocalMesh, for_model, tiny_spec
from localmesh.v1 import inference_service_pb2 as pb

PAUSE_SECONDS = 0.02


class Traffic:
    """Calls one after the other, in some tasks, until stopped; what became of each is counted."""

    def __init__(self, mesh: LocalMesh, model: str) -> None:
        self._mesh = mesh
        self._model = model
        self._stop = asyncio.Event()
        self.answers = 0
        self.failures: Counter[str] = Counter()

    async def run(self) -> None:
        while not self._stop.is_set():
            await self.call()
            await asyncio.sleep(PAUSE_SECONDS)

    async def call(self) -> bool:
        request = pb.GenerateRequest(prompt="The", sampling=pb.SamplingOptions(max_tokens=4, temperature=0))
        try:
            answer = await self._mesh.inference.Generate(request, metadata=for_model(self._model), timeout=20)
        except grpc.aio.AioRpcError as error:
            self.failures[f"{error.code().name} {reason_of(error.trailing_metadata())}".strip()] += 1
            return False
        assert answer.usage.completion_tokens == 4
        self.answers += 1
        return True

    async def more(self, count: int = 10) -> None:
        """Wait until that many more calls were answered."""
        wanted = self.answers + count

        async def enough() -> bool:
            return self.answers >= wanted

        await self._mesh.until(enough, seconds=60)

    def stop(self) -> None:
        self._stop.set()


@pytest.fixture
def etcd_environment() -> dict[str, str]:
    """Return the variable that names the etcd to test with, where there is one."""
    binary = os.environ.get("LOCALMESH_ETCD_BIN", "")  # noqa: TID251 - tests choose the binary by it
    return {"LOCALMESH_ETCD_BIN": binary} if binary else {}


@asynccontextmanager
async def traffic(mesh: LocalMesh, model: str, callers: int = 2) -> AsyncIterator[Traffic]:
    """Yield traffic that runs."""
    flow = Traffic(mesh, model)
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(flow.run())
        try:
            yield flow
        finally:
            flow.stop()


@asynccontextmanager
async def serving_mesh(environment: dict[str, str], *, durable: bool = False) -> AsyncIterator[LocalMesh]:
    """Yield a mesh of two nodes with a replica of the model "tiny" on each."""
    async with LocalMesh(durable=durable, environment=environment) as mesh:
        await mesh.apply(tiny_spec(), min_replicas=2, max_replicas=2)
        await mesh.routable("tiny", 2)
        yield mesh


@pytest.fixture(name="traffic")
def traffic_fixture():
    """Return `traffic`."""
    return traffic


@pytest.fixture(name="serving_mesh")
def serving_mesh_fixture():
    """Return `serving_mesh`."""
    return serving_mesh
