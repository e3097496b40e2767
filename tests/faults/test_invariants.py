"""The invariants of the design, over every revision of the store, while everything is killed and frozen in turn.

`LOCALMESH_FAULT_SECONDS` lets the faults go on for longer than the gates have time for; `LOCALMESH_FAULT_SEED` repeats
a sequence that was printed by an earlier run.
"""

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc
import pytest

from localmesh.core.clock import SystemClock
from localmesh.etcd import find_etcd
from localmesh.testing import LocalMesh, for_model, tiny_spec
from localmesh.v1 import inference_service_pb2 as pb
from localmesh.v1 import registry_service_pb2 as registry_pb
from localmesh.v1 import types_pb2, worker_service_pb2, worker_service_pb2_grpc
from tests.faults.history import Recorder, leftovers, violations

FAULT_SECONDS = float(os.environ.get("LOCALMESH_FAULT_SECONDS", "20"))  # noqa: TID251 - for runs by hand
SEED = int(os.environ.get("LOCALMESH_FAULT_SEED", "20261121"))  # noqa: TID251 - as above

pytestmark = pytest.mark.timeout(240 + FAULT_SECONDS)

MIB = 1 << 20
NODES = ("alpha", "beta", "gamma")
# Two of the three models fit on a node: placing, editing and moving compete for room.
SETTINGS = {"worker.memory_budget": "230MiB", "worker.max_replicas_per_model": 2, "router.hold_seconds": 15}
MODELS = {"busy": (2, 3), "calm": (1, 2), "cold": (0, 1)}
COMPONENTS = ("router", "registry", "etcd", *NODES)
CLOCK = SystemClock()


def spec(name: str, context_tokens: int = 256) -> types_pb2.ModelSpec:
    declared = tiny_spec(name, context_tokens=context_tokens)
    declared.resources.memory_bytes = 100 * MIB
    return declared


@asynccontextmanager
async def recorded_mesh(environment: dict[str, str]) -> AsyncIterator[tuple[LocalMesh, Recorder]]:
    """Yield a mesh that serves, with a record of its store from the first revision on."""
    if not find_etcd(environment.get("LOCALMESH_ETCD_BIN")).durable:
        pytest.skip("the etcd of this machine is not fit to keep data")
    async with LocalMesh(nodes=NODES, durable=True, environment=environment, settings=SETTINGS) as mesh:
        recorder = Recorder(mesh.etcd_endpoint, "/localmesh/test/")
        async with asyncio.TaskGroup() as group:
            recording = group.create_task(recorder.run())
            for name, (least, most) in MODELS.items():
                await mesh.apply(spec(name), min_replicas=least, max_replicas=most)
            await mesh.routable("busy", 2)
            await mesh.routable("calm", 1)
            yield mesh, recorder
            recording.cancel()


class Callers:
    """Short calls to every model, one after the other; which ones fail is counted, not judged."""

    def __init__(self, mesh: LocalMesh) -> None:
        self._mesh = mesh
        self.answers: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()

    async def run(self, model: str) -> None:
        request = pb.GenerateRequest(prompt="The", sampling=pb.SamplingOptions(max_tokens=3, temperature=0))
        while True:
            try:
                await self._mesh.inference.Generate(request, metadata=for_model(model), timeout=8)
                self.answers[model] += 1
            except grpc.aio.AioRpcError as error:
                self.failures[f"{model} {error.code().name}"] += 1
            await asyncio.sleep(0.05)


@asynccontextmanager
async def calls(mesh: LocalMesh, *models: str) -> AsyncIterator[Callers]:
    """Yield calls that go on until the block is left."""
    callers = Callers(mesh)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(callers.run(model)) for model in models]
        yield callers
        for task in tasks:
            task.cancel()


class Faults:
    """A sequence of faults and changes that follows from its seed, as far as the mesh's own timing lets it."""

    def __init__(self, mesh: LocalMesh, seed: int) -> None:
        self._mesh = mesh
        self._dice = random.Random(seed)
        self.done: list[str] = []

    async def go_on(self, seconds: float) -> None:
        """Break one thing after another."""
        until = CLOCK.monotonic() + seconds
        while CLOCK.monotonic() < until:
            fault = self._dice.choice(
                [self._kill, self._kill, self._kill_replica, self._freeze, self._edit, self._delete]
            )
            with suppress(grpc.aio.AioRpcError):  # what is broken already does not answer
                self.done.append(await fault())
            await asyncio.sleep(self._dice.uniform(0.1, 1.5))

    async def _kill(self) -> str:
        name = self._dice.choice(COMPONENTS)
        self._mesh.kill(name)
        return f"kill {name}"

    async def _freeze(self) -> str:
        name, seconds = self._dice.choice(COMPONENTS), self._dice.choice([0.5, 2.0, 7.0])
        pid = self._mesh.pid(name)
        if not pid:
            return f"{name} is between two lives"
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        return f"freeze {name} for {seconds} s"

    async def _kill_replica(self) -> str:
        node = self._dice.choice(NODES)
        pids = await processes(self._mesh, node)
        if not pids:
            return f"no replica on {node}"
        name = self._dice.choice(sorted(pids))
        with suppress(ProcessLookupError):
            os.kill(pids[name], signal.SIGKILL)
        return f"kill {name}"

    async def _edit(self) -> str:
        name = self._dice.choice(sorted(MODELS))
        context_tokens, (least, most) = self._dice.choice([256, 320, 384]), MODELS[name]
        await self._mesh.apply(spec(name, context_tokens), min_replicas=least, max_replicas=most)
        return f"edit {name}: {context_tokens}"

    async def _delete(self) -> str:
        name = self._dice.choice(sorted(MODELS))
        await self._mesh.registry.DeleteModel(registry_pb.DeleteModelRequest(name=name), timeout=5)
        return f"delete {name}"


async def processes(mesh: LocalMesh, node: str) -> dict[str, int]:
    """Return the processes of a node's replicas, by name."""
    worker = next(w for w in mesh.household.workers if w.spec.config.worker.name == node)
    assert worker.address is not None
    stub = worker_service_pb2_grpc.WorkerServiceStub(mesh.channel(worker.address.endpoint))
    answer = await stub.ListProcesses(worker_service_pb2.ListProcessesRequest(), timeout=5)
    return {f"{p.ref.model}/{p.ref.node}/{p.ref.index}": p.pid for p in answer.processes if p.pid}


async def settled(mesh: LocalMesh, recorder: Recorder) -> None:
    """Wait until the mesh is whole and at rest: invariants 5 and 6.

    Raises:
        TimeoutError: It does not come to rest; the message has what is still wrong.
    """
    wrong: list[str] = []

    async def at_rest() -> bool:
        wrong[:] = leftovers(recorder.changes)
        replicas = await mesh.replicas()
        recorded = {f"{r.ref.model}/{r.ref.node}/{r.ref.index}" for r in replicas}
        running: set[str] = set()
        for node in NODES:
            running |= (await processes(mesh, node)).keys()
        wrong.extend(f"{name} has no process" for name in recorded - running)
        wrong.extend(f"{name} runs and has no record" for name in running - recorded)
        ready = Counter(r.ref.model for r in replicas if r.routable)
        wrong.extend(f"{name} has {ready[name]} of {n} replicas" for name, (n, _) in MODELS.items() if ready[name] < n)
        wrong.extend(f"{r.ref.model}/{r.ref.node} is {r.state}" for r in replicas if not r.routable)
        return not wrong

    try:
        await mesh.until(at_rest, seconds=60)
    except TimeoutError as error:
        raise TimeoutError(f"{error}; {wrong}") from error


async def test_the_invariants_hold_whatever_is_killed_or_frozen(etcd_environment) -> None:
    """F4 F41 F43: invariants 1, 2 and 4 at every revision; 5 and 6 when all is quiet again."""
    async with recorded_mesh(etcd_environment) as (mesh, recorder):
        faults = Faults(mesh, SEED)
        async with calls(mesh, *MODELS, "busy", "busy") as callers:
            await faults.go_on(FAULT_SECONDS)
        print(f"seed {SEED}: {faults.done}; {callers.answers}; {callers.failures}")
        for name, (least, most) in MODELS.items():

            async def declared(name: str = name, least: int = least, most: int = most) -> bool:
                await mesh.apply(spec(name), min_replicas=least, max_replicas=most)
                return True

            await mesh.until(declared)
        await settled(mesh, recorder)
        async with calls(mesh, *MODELS) as afterwards:

            async def all_answer() -> bool:
                return all(afterwards.answers[name] >= 3 for name in MODELS)

            await mesh.until(all_answer, seconds=60)
        await settled(mesh, recorder)
        assert not recorder.problem
        assert violations(recorder.changes) == []
        assert callers.answers.total() > 0


async def test_while_etcd_is_away_requests_go_on_and_nothing_is_reloaded(etcd_environment) -> None:
    """F4: invariant 7. etcd does not answer for longer than every lease of presence lives."""
    async with recorded_mesh(etcd_environment) as (mesh, recorder):
        await settled(mesh, recorder)
        before = [await processes(mesh, node) for node in NODES]
        async with calls(mesh, "busy", "calm") as callers:
            mesh.pause("etcd")
            await asyncio.sleep(10)  # what is tested is the passing of time
            while_away = callers.answers.copy()
            mesh.resume("etcd")

            async def more() -> bool:
                return all(callers.answers[name] > while_away[name] + 20 for name in ("busy", "calm"))

            await mesh.until(more)
        await settled(mesh, recorder)
        assert not callers.failures
        assert min(while_away[name] for name in ("busy", "calm")) > 10
        assert [await processes(mesh, node) for node in NODES] == before
        assert violations(recorder.changes) == []
