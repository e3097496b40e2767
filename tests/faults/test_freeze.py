"""Frozen processes (SIGSTOP): they keep their connections and do not answer, which is worse than being dead."""

import os
import signal

import pytest

from localmesh.core.ids import ModelName, NodeName, ReplicaId
from localmesh.v1 import registry_service_pb2 as registry_pb
from localmesh.v1 import router_service_pb2 as router_pb
from localmesh.v1 import types_pb2 as types

pytestmark = pytest.mark.timeout(180)

ALPHA = ReplicaId(ModelName("tiny"), NodeName("alpha"), 0)
BETA = ReplicaId(ModelName("tiny"), NodeName("beta"), 0)


async def test_a_frozen_replica_costs_its_calls_some_seconds_and_no_answer(
    serving_mesh, traffic, etcd_environment
) -> None:
    """F5 F15 F19: pings notice it in about 7 s; its calls, of which no byte had come, are sent elsewhere."""
    async with serving_mesh(etcd_environment) as mesh:
        async with traffic(mesh, "tiny") as flow:
            await flow.more()
            pid = await mesh.kill_replica(ALPHA, signal.SIGSTOP)
            try:

                async def noticed() -> bool:
                    return "not picking tiny/alpha/0" in mesh.log("router")

                await mesh.until(noticed, seconds=30)
                await flow.more(20)
            finally:
                os.kill(pid, signal.SIGCONT)
            await flow.more(20)
        assert not flow.failures
        assert await mesh.replica_pid(ALPHA) == pid


async def test_a_frozen_worker_loses_its_presence_and_is_taken_back_without_a_reload(
    serving_mesh, traffic, etcd_environment
) -> None:
    """F4 F5: its lease ends, the other node serves; thawed, it registers again and its replica is adopted."""
    async with serving_mesh(etcd_environment) as mesh:
        before = [await mesh.replica_pid(ALPHA), await mesh.replica_pid(BETA)]
        async with traffic(mesh, "tiny") as flow:
            await flow.more()
            mesh.pause("alpha")

            async def gone() -> bool:
                nodes = (await mesh.registry.ListNodes(registry_pb.ListNodesRequest(), timeout=10)).nodes
                return any(n.name == "alpha" and n.state == types.NODE_STATE_GONE for n in nodes)

            await mesh.until(gone, seconds=30)
            await flow.more(20)
            mesh.resume("alpha")
            await mesh.routable("tiny", 2)
            await flow.more(20)
        assert not flow.failures
        assert [await mesh.replica_pid(ALPHA), await mesh.replica_pid(BETA)] == before


async def test_while_etcd_is_frozen_requests_go_on(serving_mesh, traffic, etcd_environment) -> None:
    """F4: longer than every presence lease; nothing is reloaded when it thaws."""
    async with serving_mesh(etcd_environment) as mesh:
        before = [await mesh.replica_pid(ALPHA), await mesh.replica_pid(BETA)]
        async with traffic(mesh, "tiny") as flow:
            await flow.more()
            mesh.pause("etcd")
            answers = flow.answers

            async def silent() -> bool:
                status = await mesh.router.GetStatus(router_pb.GetStatusRequest(), timeout=5)
                return status.store_silence.seconds >= 7

            await mesh.until(silent, seconds=30)
            assert flow.answers > answers + 20
            mesh.resume("etcd")
            await mesh.routable("tiny", 2)
            await flow.more(20)
        assert not flow.failures
        assert [await mesh.replica_pid(ALPHA), await mesh.replica_pid(BETA)] == before
