"""Any bytes sent to any port leave every component up."""

import asyncio
import random

import pytest

from localmesh.core.ids import ModelName, NodeName, ReplicaId
from localmesh.testing import for_model
from localmesh.v1 import inference_service_pb2 as pb

pytestmark = pytest.mark.timeout(180)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
ROUNDS = 40


def noise(dice: random.Random) -> bytes:
    """Return bytes that are nothing, or begin like a connection that is one of ours."""
    body = dice.randbytes(dice.choice([0, 1, 9, 100, 5000]))
    settings = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    frame = dice.randbytes(3)[:1] + b"\x00" + dice.randbytes(1) + dice.randbytes(6) + body
    return dice.choice([body, b"GET / HTTP/1.1\r\n\r\n", PREFACE + body, PREFACE + settings + frame, PREFACE + frame])


async def throw(endpoint: str, data: bytes) -> None:
    host, _, port = endpoint.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        await writer.drain()
    except ConnectionError:
        pass  # it hung up on us, as it may
    finally:
        writer.transport.abort()


async def test_noise_on_every_port_stops_nothing(serving_mesh, etcd_environment) -> None:
    async with serving_mesh(etcd_environment) as mesh:
        replicas = [ReplicaId(ModelName("tiny"), NodeName(n), 0) for n in ("alpha", "beta")]
        pids = [await mesh.replica_pid(replica) for replica in replicas]
        endpoints = [mesh.router_endpoint, mesh.registry_endpoint]
        endpoints += [w.address.endpoint for w in mesh.household.workers]
        endpoints += [r.endpoint for r in await mesh.replicas()]
        dice = random.Random(20261121)
        for _ in range(ROUNDS):
            await asyncio.gather(*(throw(endpoint, noise(dice)) for endpoint in endpoints))
        assert {name: mesh.starts(name) for name in ("router", "registry", "alpha", "beta")} == dict.fromkeys(
            ("router", "registry", "alpha", "beta"), 1
        )
        assert [await mesh.replica_pid(replica) for replica in replicas] == pids
        for _ in replicas:
            request = pb.GenerateRequest(prompt="The", sampling=pb.SamplingOptions(max_tokens=4, temperature=0))
            answer = await mesh.inference.Generate(request, metadata=for_model("tiny"), timeout=20)
            assert answer.usage.completion_tokens


async def test_messages_of_noise_are_answered_with_a_status(serving_mesh, etcd_environment) -> None:
    """Well-formed calls of every method with bytes that are no message of it."""
    import grpc
    from google.protobuf.descriptor_pool import Default

    dice = random.Random(7)
    async with serving_mesh(etcd_environment) as mesh:
        replica = (await mesh.replicas("tiny"))[0]
        worker = mesh.household.workers[0].address.endpoint
        places = {
            "localmesh.v1.RegistryService": [mesh.registry_endpoint],
            "localmesh.v1.RouterService": [mesh.router_endpoint],
            "localmesh.v1.WorkerService": [worker],
            "localmesh.v1.InferenceService": [mesh.router_endpoint, replica.endpoint],
            "no.such.Service": [mesh.router_endpoint, mesh.registry_endpoint, worker, replica.endpoint],
        }
        codes = set()
        for service, endpoints in places.items():
            names = ["Nothing"]
            if service.startswith("localmesh"):
                names = [m.name for m in Default().FindServiceByName(service).methods]
            for endpoint in endpoints:
                for name in names:
                    call = mesh.channel(endpoint).unary_unary(f"/{service}/{name}")
                    try:
                        await call(b"\xff" + dice.randbytes(64), metadata=for_model("tiny"), timeout=10)
                    except grpc.aio.AioRpcError as error:
                        codes.add(error.code())
        assert grpc.StatusCode.UNKNOWN not in codes
        assert grpc.StatusCode.UNAVAILABLE not in codes
        assert all(mesh.starts(name) == 1 for name in ("router", "registry", "alpha", "beta"))
        assert len(await mesh.routable("tiny", 2)) == 2
