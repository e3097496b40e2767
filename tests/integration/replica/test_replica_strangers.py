"""Clients without code of localmesh's: buf curl by reflection; callers with and without the right certificate."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from localmesh.core.replica_process import TlsPaths
from localmesh.rpc.authority import CertificateAuthority
from localmesh.rpc.errors import from_rpc_error
from localmesh.v1 import inference_service_pb2 as pb
from localmesh.v1.inference_service_pb2_grpc import InferenceServiceStub


def buf(*arguments: str) -> str:
    program = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
    if program is None:
        pytest.skip("buf is not installed: pip install buf-bin")
    done = subprocess.run(
        [program, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_buf_curl_finds_both_services_with_no_proto_files(tiny: Any) -> None:
    """F54."""
    services = buf("--list-methods", f"http://{tiny.endpoint}")
    assert "localmesh.v1.InferenceService/StreamChat" in services
    assert "backend.Backend/Predict" in services


def test_buf_curl_chats_with_no_proto_files(tiny: Any) -> None:
    """F54."""
    request = {
        "messages": [{"role": "ROLE_USER", "content": "What is the capital of France?"}],
        "sampling": {"temperature": 0},
    }
    url = f"http://{tiny.endpoint}/localmesh.v1.InferenceService/"
    answer = json.loads(buf("--data", json.dumps(request), url + "Chat"))
    assert answer["message"]["content"] == "The capital of France is Paris."
    assert answer["finishReason"] == "FINISH_REASON_STOP"
    streamed = buf("--data", json.dumps(request), url + "StreamChat")
    pieces = re.findall(r'"content": (".*")', streamed)
    assert len(pieces) > 5
    assert "".join(json.loads(piece) for piece in pieces) == "The capital of France is Paris."


async def test_with_tls_only_identities_of_the_mesh_are_served(
    start_replica: Callable[..., Any], spec: Callable[..., Any], tmp_path: Path
) -> None:
    """F60."""
    ours = CertificateAuthority.create(tmp_path / "ca", "test")
    foreign = CertificateAuthority.create(tmp_path / "foreign", "test")
    node = ours.issue_files(tmp_path / "node", "node", "n1", ["127.0.0.1"])
    tls = TlsPaths(cert=str(node.cert), key=str(node.key), ca=str(node.ca))
    replica = await asyncio.to_thread(lambda: start_replica(spec(), tls=tls).ready())

    async def tokenize(authority: CertificateAuthority) -> Any:
        certificate, key = authority.issue("client", "c")
        credentials = grpc.ssl_channel_credentials(ours.ca_pem, key, certificate)
        async with grpc.aio.secure_channel(replica.endpoint, credentials) as channel:
            return await InferenceServiceStub(channel).Tokenize(pb.TokenizeRequest(text="x"), timeout=10)

    assert (await tokenize(ours)).tokens
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await tokenize(foreign)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    async with grpc.aio.insecure_channel(replica.endpoint) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await InferenceServiceStub(channel).Tokenize(pb.TokenizeRequest(text="x"), timeout=10)
        assert from_rpc_error(caught.value).reason == "COMPONENT_UNREACHABLE"
