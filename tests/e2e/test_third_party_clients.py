"""Clients that have none of our code and no proto files: grpcurl and `buf curl`, by reflection."""

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BUF = Path(sys.executable).with_name("buf")
TINY = """apiVersion: localmesh/v1
kind: Model
name: strangers
engine: llama
source: tiny.gguf
parameters: {context_tokens: 128, slots: 1}
placement: {min_replicas: 1, max_replicas: 1}
"""


@pytest.fixture(scope="module")
def endpoints(mesh) -> dict[str, str]:
    """One address of each kind of server, in a mesh that serves the model "strangers"."""
    assert mesh.run("apply", "-f", "-", text=TINY).returncode == 0
    mesh.until(lambda: any(r.get("routable") for r in mesh.json("replicas", "strangers")["replicas"]))
    running = mesh.running()
    return {
        "registry": running["registry"],
        "router": running["router"],
        "worker": mesh.json("nodes")["nodes"][0]["endpoint"],
        "replica": mesh.json("replicas", "strangers")["replicas"][0]["endpoint"],
    }


def grpcurl(*words: str) -> subprocess.CompletedProcess[str]:
    found = shutil.which("grpcurl")
    if found is None:
        pytest.skip("grpcurl is not installed")
    return subprocess.run([found, "-plaintext", "-max-time", "20", *words], capture_output=True, text=True, timeout=60)


def buf_curl(endpoint: str, method: str, body: object, *headers: str) -> subprocess.CompletedProcess[str]:
    if not BUF.exists():
        pytest.skip("buf is not installed")
    extra = [word for header in headers for word in ("-H", header)]
    fixed = [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", json.dumps(body)]
    return subprocess.run([*fixed, *extra, f"http://{endpoint}/{method}"], capture_output=True, text=True, timeout=60)


SERVICES = {
    "registry": "localmesh.v1.RegistryService",
    "router": "localmesh.v1.RouterService",
    "worker": "localmesh.v1.WorkerService",
    "replica": "localmesh.v1.InferenceService",
}


@pytest.mark.parametrize(("server", "service"), SERVICES.items())
def test_grpcurl_finds_every_service_and_its_health(endpoints, server: str, service: str) -> None:
    """F53 F54: reflection and health, overall and by service, on every server."""
    listed = grpcurl(endpoints[server], "list")
    assert listed.returncode == 0, listed.stderr
    assert {service, "grpc.health.v1.Health"} <= set(listed.stdout.split())
    for name in ("", service):
        health = grpcurl("-d", json.dumps({"service": name}), endpoints[server], "grpc.health.v1.Health/Check")
        assert json.loads(health.stdout) == {"status": "SERVING"}, health.stderr


@pytest.mark.parametrize(("server", "service"), SERVICES.items())
def test_buf_curl_finds_every_service(endpoints, server: str, service: str) -> None:
    """F53 F54."""
    health = buf_curl(endpoints[server], "grpc.health.v1.Health/Check", {"service": service})
    assert json.loads(health.stdout) == {"status": "SERVING"}, health.stderr


def test_a_replica_and_the_router_tell_the_health_of_a_model(endpoints) -> None:
    for server in ("replica", "router"):
        health = buf_curl(endpoints[server], "grpc.health.v1.Health/Check", {"service": "strangers"})
        assert json.loads(health.stdout) == {"status": "SERVING"}, health.stderr


def test_grpcurl_streams_text_through_the_router(endpoints) -> None:
    """F54 F55: the metadata names the model, reflection names the messages."""
    body = json.dumps({"prompt": "The function returns", "sampling": {"maxTokens": 8, "temperature": 0}})
    said = grpcurl(
        "-H",
        "localmesh-model: strangers",
        "-d",
        body,
        endpoints["router"],
        "localmesh.v1.InferenceService/StreamGenerate",
    )
    assert said.returncode == 0, said.stderr
    assert '"finish_reason": "FINISH_REASON_LENGTH"' in said.stdout
    assert '"completion_tokens": 8' in said.stdout


def test_grpcurl_speaks_the_foreign_protocol_through_the_router(endpoints) -> None:
    """F47 F55."""
    said = grpcurl("-H", "localmesh-model: strangers", endpoints["router"], "backend.Backend/Health")
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["message"] == "T0s="  # "OK"


def test_strangers_see_reasons_too(endpoints) -> None:
    refused = buf_curl(
        endpoints["router"], "localmesh.v1.InferenceService/Tokenize", {"text": "a"}, "localmesh-model: nobody"
    )
    assert refused.returncode != 0
    error = json.loads(refused.stderr)
    assert error["code"] == "not_found"
    assert "nobody" in error["message"]
    details = [base64.b64decode(detail["value"] + "==") for detail in error["details"]]
    assert any(b"MODEL_NOT_FOUND" in detail and b"localmesh.dev" in detail for detail in details)
