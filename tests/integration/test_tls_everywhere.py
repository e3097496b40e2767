"""A mesh with certificates of another CA than ours: who may do what, new certificates while streams run, old ones."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from localmesh.app import registry, router, worker
from localmesh.app.config import Config, EtcdSection, RegistrySection, RouterSection, TlsSection, WorkerSection
from localmesh.app.lifeline import Ready
from localmesh.core.errors import MeshError, PermissionDenied, Unauthenticated
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.errors import TlsTrouble, from_rpc_error
from localmesh.rpc.metadata import MODEL
from localmesh.rpc.server import GrpcServer, ServerConfig
from localmesh.rpc.tls import TlsConfigError, TlsFiles
from localmesh.testing import MODELS_FOLDER, tiny_spec
from localmesh.v1 import inference_service_pb2 as ipb
from localmesh.v1 import inference_service_pb2_grpc, registry_service_pb2_grpc, types_pb2
from localmesh.v1 import registry_service_pb2 as pb
from tests.integration.pki_kit import OtherCa

pytest.importorskip("xllamacpp", reason="the extra 'engines' is not installed")

WAIT = 60.0
TINY = ((MODEL, "tiny"),)


class Mesh:
    """Registry, router and one worker, each with its own certificate."""

    def __init__(self, ca: OtherCa, addresses: dict[str, Ready]) -> None:
        self.ca = ca
        self.registry = addresses["registry"].endpoint
        self.router = addresses["router"].endpoint

    async def until_ready(self, pool: ChannelPool) -> str:
        """Apply the model and return the endpoint of its replica."""
        stub = registry_service_pb2_grpc.RegistryServiceStub(pool.get(self.registry))
        await stub.ApplyModel(pb.ApplyModelRequest(spec=tiny_spec(context_tokens=4096)), timeout=WAIT)
        inference = inference_service_pb2_grpc.InferenceServiceStub(pool.get(self.router))
        await inference.Tokenize(ipb.TokenizeRequest(text="x"), metadata=TINY, timeout=WAIT)
        found = await stub.ListReplicas(pb.ListReplicasRequest(), timeout=WAIT)
        return str(found.replicas[0].endpoint)


def section(files: TlsFiles) -> TlsSection:
    return TlsSection(cert=files.cert, key=files.key, ca=files.ca)


@pytest.fixture
async def mesh(etcd_endpoint: str, mesh_name: str, tmp_path: Path) -> AsyncIterator[Mesh]:
    ca = await asyncio.to_thread(OtherCa, tmp_path / "pki", mesh_name)
    base = Config(
        mesh=mesh_name,
        state_dir=tmp_path / "s",
        models_dir=MODELS_FOLDER,
        drain_seconds=3.0,
        etcd=EtcdSection(endpoints=(etcd_endpoint,)),
        registry=RegistrySection(listen="127.0.0.1:0"),
        router=RouterSection(listen="127.0.0.1:0", name="router"),
    )
    addresses: dict[str, Ready] = {}
    async with contextlib.AsyncExitStack() as stack:
        for role, component in (("registry", registry), ("router", router)):
            config = replace(base, tls=section(ca.issue(role, role)))
            addresses[role] = await stack.enter_async_context(component.serve(config))
        node = WorkerSection(name="node", registries=(addresses["registry"].endpoint,), listen="127.0.0.1:0")
        await stack.enter_async_context(worker.serve(replace(base, tls=section(ca.issue("node", "node")), worker=node)))
        yield Mesh(ca, addresses)


async def refusal(call: Any) -> MeshError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_each_may_do_what_its_certificate_says(mesh: Mesh, tmp_path: Path) -> None:
    """F60: on registry, router and replica, with a chain of certificates that our tools did not make."""
    ca = mesh.ca
    strangers = OtherCa(tmp_path / "strangers", "any")
    async with contextlib.AsyncExitStack() as stack:

        async def holder(files: TlsFiles) -> ChannelPool:
            return await stack.enter_async_context(ChannelPool(files))

        operator, client = await holder(ca.issue("operator", "alice")), await holder(ca.issue("client", "app"))
        node = await holder(ca.issue("node", "other"))
        nobody, elsewhere = await holder(ca.issue("", "nobody")), await holder(ca.issue("operator", "eve", mesh="else"))
        replica = await mesh.until_ready(operator)

        def at(pool: ChannelPool) -> Any:
            return registry_service_pb2_grpc.RegistryServiceStub(pool.get(mesh.registry))

        def infer(pool: ChannelPool, endpoint: str) -> Any:
            stub = inference_service_pb2_grpc.InferenceServiceStub(pool.get(endpoint))
            return stub.Tokenize(ipb.TokenizeRequest(text="x"), metadata=TINY, timeout=WAIT)

        apply, register = pb.ApplyModelRequest(), pb.RegisterRequest(node="node", public_key=b"x")
        for call in (
            at(node).ApplyModel(apply, timeout=WAIT),
            at(client).ApplyModel(apply, timeout=WAIT),
            at(client).Register(register, timeout=WAIT),
            at(operator).Register(register, timeout=WAIT),
            at(node).Register(register, timeout=WAIT),  # for another node
            at(node).Deregister(pb.DeregisterRequest(node="node", incarnation=1), timeout=WAIT),
        ):
            assert isinstance(await refusal(call), PermissionDenied)
        for pool in (nobody, elsewhere):
            for call in (at(pool).ListNodes(pb.ListNodesRequest()), infer(pool, mesh.router), infer(pool, replica)):
                assert isinstance(await refusal(call), Unauthenticated)
        bare = grpc.ssl_channel_credentials(ca.ca.read_bytes())
        stranger = await holder(replace(strangers.issue("operator", "alice"), ca=ca.ca))
        for endpoint in (mesh.registry, mesh.router, replica):
            async with grpc.aio.secure_channel(endpoint, bare) as channel:
                stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
                assert isinstance(await refusal(stub.Tokenize(ipb.TokenizeRequest(text="x"))), TlsTrouble)
            assert isinstance(await refusal(infer(stranger, endpoint)), TlsTrouble)
        for pool in (client, node, operator):
            assert (await infer(pool, replica)).tokens
            assert (await infer(pool, mesh.router)).tokens


async def test_new_certificates_are_taken_up_while_a_stream_goes_on(mesh: Mesh) -> None:
    """F60: of every component and of the caller, none of which is restarted."""
    mine = mesh.ca.issue("operator", "alice")
    async with ChannelPool(mine) as pool, asyncio.timeout(WAIT):
        replica = await mesh.until_ready(pool)
        endpoints = (mesh.registry, mesh.router, replica)
        before = [await asyncio.to_thread(shown, endpoint) for endpoint in endpoints]
        channel = pool.get(mesh.router)
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        asked = ipb.SamplingOptions(max_tokens=1500, grammar='root ::= "ab" root')
        stream = stub.StreamGenerate(ipb.StreamGenerateRequest(prompt="The", sampling=asked), metadata=TINY)
        assert await stream.read() is not grpc.aio.EOF
        for role, name in (("registry", "registry"), ("router", "router"), ("node", "node"), ("operator", "alice")):
            mesh.ca.issue(role, name)
        after = [await asyncio.to_thread(shown, endpoint) for endpoint in endpoints]
        assert all(old != new for old, new in zip(before, after, strict=True))
        while pool.get(mesh.router) is channel:
            await asyncio.sleep(0.1)  # the pool looks at its files once a second
        newcomer = inference_service_pb2_grpc.InferenceServiceStub(pool.get(mesh.router))
        assert (await newcomer.Tokenize(ipb.TokenizeRequest(text="x"), metadata=TINY)).tokens
        messages = 1
        while await stream.read() is not grpc.aio.EOF:
            messages += 1
        assert await stream.code() is grpc.StatusCode.OK
        assert messages > 100
        nodes = await registry_service_pb2_grpc.RegistryServiceStub(pool.get(mesh.registry)).ListNodes(
            pb.ListNodesRequest()
        )
        assert [node.state for node in nodes.nodes] == [types_pb2.NODE_STATE_LIVE]


def shown(endpoint: str) -> str:
    host, _, port = endpoint.rpartition(":")
    return ssl.get_server_certificate((host, int(port)))


async def test_a_certificate_that_is_out_of_date_is_named(tmp_path: Path) -> None:
    """F60: at the start of whoever has it, and by callers of one that has expired meanwhile."""
    ca = OtherCa(tmp_path / "pki", "home")
    old = ca.issue("operator", "old", hours=-1)
    with pytest.raises(TlsConfigError, match=r"operator-old\.pem has expired on 20\d\d-"):
        ChannelPool(old)
    with pytest.raises(TlsConfigError, match="has expired on"):
        await GrpcServer(ServerConfig(tls=old), name="x").start()

    short, mine = ca.issue("router", "short", hours=3 / 3600), ca.issue("client", "me")
    async with GrpcServer(ServerConfig(tls=short), name="short") as server, asyncio.timeout(WAIT):

        async def probe() -> MeshError:
            async with ChannelPool(mine) as pool:
                return await refusal(pool.get(server.endpoint).unary_unary("/t.T/Any")(b"", timeout=10))

        while not isinstance(error := await probe(), TlsTrouble):
            await asyncio.sleep(0.2)  # it expires by the clock
        assert "has expired: renew it" in error.message
        # An old one does not replace a good one; a good one is taken up.
        ca.issue("router", "short")
        assert not isinstance(await probe(), TlsTrouble)
        ca.issue("router", "short", hours=-1)
        assert not isinstance(await probe(), TlsTrouble)


async def test_what_is_wrong_with_a_connection_is_said(tmp_path: Path) -> None:
    """F60: another CA, another address, plain text on one side."""
    ca, others = OtherCa(tmp_path / "pki", "home"), OtherCa(tmp_path / "others", "home")
    mine, theirs = ca.issue("client", "me"), others.issue("client", "me")
    here, away = ca.issue("router", "here"), ca.issue("router", "away", hosts=["198.18.1.1"])

    async def said(server: TlsFiles | None, caller: TlsFiles | None) -> str:
        async with GrpcServer(ServerConfig(tls=server), name="x") as running, ChannelPool(caller) as pool:
            error = await refusal(pool.get(running.endpoint).unary_unary("/t.T/Any")(b"", timeout=WAIT))
            assert isinstance(error, TlsTrouble), error
            return error.message

    assert "not signed by the given CA" in await said(here, replace(mine, ca=theirs.ca))
    assert "not for this address" in await said(away, mine)
    assert "There is no TLS there" in await said(None, mine)
    assert "no valid certificate of their CA" in await said(here, None)
    assert "no valid certificate of their CA" in await said(here, replace(theirs, ca=mine.ca))
