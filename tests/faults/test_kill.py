"""Kill -9 of any one component during traffic: what stops, what goes on, and that it heals."""

import os
import signal

import grpc
import pytest

from localmesh.core.ids import ModelName, NodeName, ReplicaId
from localmesh.etcd import find_etcd
from localmesh.testing import for_model, tiny_spec
from localmesh.v1 import inference_service_pb2 as pb
from localmesh.v1 import registry_service_pb2 as registry_pb
from localmesh.v1 import types_pb2 as types

pytestmark = pytest.mark.timeout(180)

LOST_STREAM = {"UNAVAILABLE REPLICA_LOST"}


async def claims(mesh) -> dict[str, int]:
    nodes = (await mesh.registry.ListNodes(registry_pb.ListNodesRequest(), timeout=10)).nodes
    return {f"{n.name}/{d.id}": d.claimed_bytes for n in nodes for d in n.devices}


async def incarnations(mesh) -> set[str]:
    """Return the incarnations of live nodes."""
    nodes = (await mesh.registry.ListNodes(registry_pb.ListNodesRequest(), timeout=10)).nodes
    return {n.incarnation for n in nodes if n.state == types.NODE_STATE_LIVE}


async def consistent(mesh) -> bool:
    """Whether each node's claims are exactly those of the replicas on it."""
    expected: dict[str, int] = {}
    for replica in await mesh.replicas():
        for device, size in replica.devices.items():
            key = f"{replica.ref.node}/{device}"
            expected[key] = expected.get(key, 0) + size
    return {k: v for k, v in (await claims(mesh)).items() if v} == expected


async def test_without_a_registry_requests_go_on_and_nothing_is_reloaded(
    serving_mesh, traffic, etcd_environment
) -> None:
    """F4 F5: the registry is killed; workers register again by themselves and their replicas are adopted."""
    async with serving_mesh(etcd_environment) as mesh:
        replicas = [ReplicaId(ModelName("tiny"), NodeName(n), 0) for n in ("alpha", "beta")]
        before = [await mesh.replica_pid(replica) for replica in replicas]
        async with traffic(mesh, "tiny") as flow:
            await flow.more()
            starts = mesh.starts("registry")
            mesh.kill("registry")
            await flow.more(20)
            await mesh.restarted("registry", after=starts)
            await mesh.routable("tiny", 2)
            await flow.more(20)
        assert not flow.failures
        assert [await mesh.replica_pid(replica) for replica in replicas] == before
        await mesh.until(lambda: consistent(mesh))


async def test_without_a_router_calls_fail_until_it_is_back(serving_mesh, traffic, etcd_environment) -> None:
    """F17: the only router is killed; its calls break, nobody is counted in flight for ever, and it comes back."""
    async with serving_mesh(etcd_environment) as mesh:
        async with traffic(mesh, "tiny") as flow:
            await flow.more()
            starts = mesh.starts("router")
            mesh.kill("router")
            await mesh.restarted("router", after=starts)
            await flow.more(20)
        assert set(flow.failures) <= {"UNAVAILABLE"}

        async def idle() -> bool:
            return all(r.in_flight == 0 for r in await mesh.replicas("tiny"))

        await mesh.until(idle)


async def test_a_killed_replica_costs_its_own_calls_only_and_is_replaced(
    serving_mesh, traffic, etcd_environment
) -> None:
    """F5 F19 F43: a call without a byte of response is sent elsewhere; the process is replaced."""
    async with serving_mesh(etcd_environment) as mesh:
        victim = ReplicaId(ModelName("tiny"), NodeName("alpha"), 0)
        async with traffic(mesh, "tiny") as flow:
            await flow.more()
            pid = await mesh.kill_replica(victim)
            await flow.more(20)

            async def replaced() -> bool:
                found = await mesh.routable("tiny", 2)
                return len(found) == 2 and await mesh.replica_pid(victim) != pid

            await mesh.until(replaced, seconds=60)
            await flow.more(20)
        assert set(flow.failures) <= LOST_STREAM
        await mesh.until(lambda: consistent(mesh))


async def test_a_killed_worker_takes_its_replicas_with_it_and_registers_anew(
    serving_mesh, traffic, etcd_environment
) -> None:
    """F5 F41 F43: requests go to the other node at once; the worker comes back and the minimum is restored."""
    async with serving_mesh(etcd_environment) as mesh:
        victim = ReplicaId(ModelName("tiny"), NodeName("alpha"), 0)
        pid = await mesh.replica_pid(victim)
        starts = mesh.starts("alpha")
        async with traffic(mesh, "tiny") as flow:
            await flow.more()
            mesh.kill("alpha")
            await flow.more(20)
            await mesh.restarted("alpha", after=starts)

            async def replaced() -> bool:
                return len([r for r in await mesh.replicas("tiny") if r.routable]) == 2

            await mesh.until(replaced, seconds=60)
            await flow.more(20)
        assert set(flow.failures) <= LOST_STREAM
        assert await mesh.replica_pid(victim) != pid
        await mesh.until(lambda: consistent(mesh))


async def test_while_etcd_is_killed_requests_go_on_and_desired_state_is_kept(
    serving_mesh, traffic, etcd_environment
) -> None:
    """F4: an etcd that keeps its data is killed; nothing is reloaded, nothing forgotten."""
    if not find_etcd(etcd_environment.get("LOCALMESH_ETCD_BIN")).durable:
        pytest.skip("the etcd of this machine is not fit to keep data")
    async with serving_mesh(etcd_environment, durable=True) as mesh:
        replicas = [ReplicaId(ModelName("tiny"), NodeName(n), 0) for n in ("alpha", "beta")]
        before = [await mesh.replica_pid(replica) for replica in replicas]
        async with traffic(mesh, "tiny") as flow:
            await flow.more()
            starts = mesh.starts("etcd")
            mesh.kill("etcd")
            await flow.more(20)
            await mesh.restarted("etcd", after=starts)
            await mesh.routable("tiny", 2)
            await flow.more(20)
        assert not flow.failures
        assert [await mesh.replica_pid(replica) for replica in replicas] == before
        await mesh.until(lambda: consistent(mesh))


async def test_after_a_throw_away_etcd_the_desired_state_is_applied_again(
    serving_mesh, traffic, etcd_environment
) -> None:
    """F4 F41: the store starts empty; models come back from the registry's folder, nodes with what they run."""
    async with serving_mesh(etcd_environment) as mesh:
        replicas = [ReplicaId(ModelName("tiny"), NodeName(n), 0) for n in ("alpha", "beta")]
        before = [await mesh.replica_pid(replica) for replica in replicas]
        lives = await incarnations(mesh)
        async with traffic(mesh, "tiny") as flow:
            starts = mesh.starts("etcd")
            mesh.kill("etcd")
            await mesh.restarted("etcd", after=starts)

            async def registered_anew() -> bool:
                return not lives & await incarnations(mesh) and await _two_ready(mesh)

            await mesh.until(registered_anew, seconds=60)
            await flow.more(20)
        assert [await mesh.replica_pid(replica) for replica in replicas] == before
        await mesh.until(lambda: consistent(mesh))


async def test_a_stream_that_breaks_is_never_taken_for_a_whole_one(serving_mesh, etcd_environment) -> None:
    """F17: a stream whose replica is killed ends with a failure, not with a short text."""
    async with serving_mesh(etcd_environment) as mesh:
        # A text so long that it takes a second at least, to be killed at its first word.
        await mesh.apply(tiny_spec("long", context_tokens=2048), min_replicas=2, max_replicas=2)
        await mesh.routable("long", 2)
        pids = [await mesh.replica_pid(ReplicaId(ModelName("long"), NodeName(n), 0)) for n in ("alpha", "beta")]
        sampling = pb.SamplingOptions(max_tokens=2000, temperature=0)
        request = pb.StreamGenerateRequest(prompt="The function returns", sampling=sampling)
        pieces = aiter(mesh.inference.StreamGenerate(request, metadata=for_model("long"), timeout=60))
        first = await anext(pieces)
        assert first.text
        assert not first.finish_reason
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(grpc.aio.AioRpcError) as broken:
            async for _ in pieces:
                pass
        assert broken.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_many_kills_leak_nothing(serving_mesh, traffic, etcd_environment) -> None:
    """F43: killing everything in turn loses no model and leaks no claim, count or replica."""
    async with serving_mesh(etcd_environment, durable=True) as mesh:
        async with traffic(mesh, "tiny") as flow:
            for name in ("router", "registry", "beta", "router", "alpha"):
                starts = mesh.starts(name)
                mesh.kill(name)
                await mesh.restarted(name, after=starts)
            await mesh.until(lambda: _two_ready(mesh), seconds=60)
            await flow.more(10)
        await mesh.until(lambda: consistent(mesh))
        found = await mesh.replicas("tiny")
        assert len(found) == 2
        assert all(r.state == types.REPLICA_STATE_READY for r in found)


async def _two_ready(mesh) -> bool:
    return len([r for r in await mesh.replicas("tiny") if r.routable]) == 2
