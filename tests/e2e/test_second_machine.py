"""A second machine: another network namespace, with an address of its own and nothing in common but the wire."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from localmesh.testing import MODELS_FOLDER

FIRST, SECOND, SECOND_TOO = "198.18.77.1", "198.18.77.2", "198.18.77.3"

TINY = """apiVersion: localmesh/v1
kind: Model
name: tiny
engine: llama
source: tiny.gguf
placement: {min_replicas: 2, max_replicas: 2, node_selector: {zone: shared}}
"""

ASK = """
import sys, grpc
from localmesh.v1 import inference_service_pb2 as pb, inference_service_pb2_grpc as rpc
router, cert, key, ca, calls = sys.argv[1:]
read = lambda path: open(path, "rb").read()
with grpc.secure_channel(router, grpc.ssl_channel_credentials(read(ca), read(key), read(cert))) as channel:
    for _ in range(int(calls)):
        call = rpc.InferenceServiceStub(channel).Generate
        answer, done = call.with_call(
            pb.GenerateRequest(prompt="The function", sampling=pb.SamplingOptions(max_tokens=2)),
            metadata=[("localmesh-model", "tiny")], timeout=30,
        )
        print(dict(done.trailing_metadata())["localmesh-served-by-node"])
"""
"""Prints which node served each of some calls."""


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=10)
    assert done.returncode == 0, (words, done.stderr)


@pytest.fixture(scope="module")
def wire() -> Iterator[tuple[str, str]]:
    """Yield the names of two network namespaces that a cable connects."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making network namespaces needs root and `ip`")
    one, two = (f"lm{os.getpid()}{side}" for side in "ab")
    probe = subprocess.run(["ip", "netns", "add", one], capture_output=True, text=True, timeout=10)
    if probe.returncode:
        pytest.skip(f"network namespaces cannot be made here: {probe.stderr.strip()}")
    try:
        ip("netns", "add", two)
        ip("link", "add", "lm0", "netns", one, "type", "veth", "peer", "name", "lm0", "netns", two)
        for space, addresses in ((one, [FIRST]), (two, [SECOND, SECOND_TOO])):
            for address in addresses:
                ip("-n", space, "address", "add", f"{address}/24", "dev", "lm0")
            for link in ("lo", "lm0"):
                ip("-n", space, "link", "set", link, "up")
        yield one, two
    finally:
        for space in (one, two):
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, timeout=10)


@pytest.fixture(scope="module")
def boxes(make_sandbox: Any, wire: tuple[str, str]) -> Iterator[Any]:
    """Yield a function that makes a sandbox on the first (0) or second (1) machine."""
    made = []

    class Machine(make_sandbox):  # type: ignore[misc]
        def __init__(self, space: str) -> None:
            super().__init__()
            self.space = space

        def command(self, *words: str) -> list[str]:
            return ["ip", "netns", "exec", self.space, *make_sandbox.command(*words)]

        def asked(self, *words: str) -> list[str]:
            """Run ASK on this machine and return the nodes."""
            command = ["ip", "netns", "exec", self.space, sys.executable, "-c", ASK, *words]
            done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            return done.stdout.split()

    def make(number: int) -> Machine:
        made.append(Machine(wire[number]))
        return made[-1]

    yield make
    for box in reversed(made):
        box.close()


@pytest.fixture(scope="module")
def first(boxes: Any) -> Any:
    """The machine that runs the mesh, with one worker."""
    box = boxes(0)
    flags = ("--worker-name", "first", "--worker-served-by", "on", "--worker-labels", "zone=shared")
    box.process = box.up("--listen", FIRST, *flags)
    return box


@pytest.fixture(scope="module")
def token(first: Any) -> str:
    line = next(line for line in first.said(first.process).splitlines() if "localmesh worker --join" in line)
    return str(line.split()[-1])


@pytest.fixture(scope="module")
def second(boxes: Any, first: Any, token: str) -> Any:
    """The machine that has joined with the printed line. The model is ready on both."""
    box = boxes(1)
    models = ("--models-dir", str(MODELS_FOLDER))
    box.process = box.start(
        *("worker", "--join", token, "--name", "second", "--served-by", "on", "--labels", "zone=shared", *models)
    )
    first.until(lambda: state(first, "second") == "NODE_STATE_LIVE" or box.process.poll() is not None)
    assert box.process.poll() is None, box.said(box.process)
    assert first.run("apply", "-f", "-", text=TINY).returncode == 0
    first.until(lambda: len(ready(first)) == 2)
    return box


def state(box: Any, node: str) -> str:
    return next((str(n["state"]) for n in box.json("nodes")["nodes"] if n["name"] == node), "")


def ready(box: Any, model: str = "tiny") -> dict[str, str]:
    """Return the endpoints of routable replicas, by node and index."""
    found = box.json("replicas", model)["replicas"]
    return {f"{r['ref']['node']}/{r['ref'].get('index', 0)}": r["endpoint"] for r in found if r["routable"]}


def comes_true(box: Any, condition: Callable[[], bool], tell: Callable[[], str]) -> None:
    """Wait for a condition; if it does not come true, fail with what is told."""
    try:
        box.until(condition)
    except AssertionError:
        raise AssertionError(tell()) from None


def operator(first: Any) -> list[str]:
    return [first.running()["router"], *(first.running()[f"tls_{part}"] for part in ("cert", "key", "ca"))]


def test_both_machines_serve_what_one_router_takes(first: Any, second: Any) -> None:
    """F1 F60: enrolled by the printed line; TLS on every way; replicas at the addresses of their machines."""
    where = ready(first)
    assert {node: endpoint.partition(":")[0] for node, endpoint in where.items()} == {
        "first-0/0": FIRST,
        "second/0": SECOND,
    }
    # what another test did a moment ago (a lost connection, calls that still count) may weigh on the first picks
    first.until(lambda: set(first.asked(*operator(first), "8")) == {"first-0", "second"}, seconds=30)
    assert second.asked(*operator(first), "1")  # the router is reached from the second machine, too


def test_commands_on_the_second_machine_say_what_they_need_and_work_with_it(first: Any, second: Any) -> None:
    """F60: without a certificate, with the operator's, and with the node's own, which may only look."""
    there = ("--router", first.running()["router"], "--registry", first.running()["registry"])
    refused = second.run("models", *there)
    assert refused.returncode == 3
    assert "tls/operator-operator" in refused.stderr
    assert "--tls-cert" in refused.stderr
    half = second.run("models", *there, "--tls-cert", first.running()["tls_cert"])
    assert half.returncode == 2
    assert "together" in half.stderr

    def shown(*files: Any) -> list[str]:
        return [
            word for pair in zip(("--tls-cert", "--tls-key", "--tls-ca"), map(str, files), strict=True) for word in pair
        ]

    mine = shown(*operator(first)[1:])
    assert second.run("generate", "tiny", "The", "-n", "2", *there, *mine).returncode == 0
    folder = second.state / "workers" / "second"
    node = shown(folder / "tls/cert.pem", folder / "node-key.pem", folder / "tls/ca.pem")
    assert second.run("models", *there, *node).returncode == 0
    denied = second.run("apply", "-f", "-", *there, *node, text=TINY)
    assert denied.returncode == 8
    assert "node/second may not call" in denied.stderr


def test_who_is_refused_is_told_why_and_leaves_nothing_behind(first: Any, second: Any, boxes: Any, token: str) -> None:
    """F3: a wrong secret, somebody else in the middle, names of others, nobody there."""
    stranger = boxes(1)
    address, _, rest = token.partition("/")
    secret, _, pin = rest.partition(".")
    another_pin = pin[:-2] + ("A" if pin[-2] != "A" else "B") + pin[-1]
    for given, name, code, words in (
        (f"{address}/{secret[::-1]}.{pin}", "uninvited", 8, "wrong or has expired"),
        (f"{address}/{secret}.{another_pin}", "uninvited", 8, "somebody else answers there"),
        (token, "second", 8, "belongs to another machine"),
        (f"{FIRST}:9/{rest}", "uninvited", 3, "nobody enrols workers at"),
    ):
        done = stranger.run("worker", "--join", given, "--name", name)
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert "localmesh up`, or name another" not in done.stderr  # that is for commands
        assert [path for path in stranger.state.rglob("*") if path.is_file()] == []
        assert stranger.processes() == {}
    assert {n["name"] for n in first.json("nodes")["nodes"]} >= {"first-0", "second"}
    assert state(first, "uninvited") == ""
    assert state(first, "second") == "NODE_STATE_LIVE"


def test_the_same_token_lets_further_machines_in_at_the_address_and_ports_they_advertise(
    first: Any, boxes: Any, token: str
) -> None:
    """F53: a worker on all addresses that advertises one, with a single port for replicas, which runs out."""
    third = boxes(1)
    flags = ("--listen", "0.0.0.0:0", "--advertise", SECOND_TOO, "--replica-ports", "9710", "--labels", "zone=third")
    process = third.start(
        *("worker", "--join", token, "--name", "third", "--models-dir", str(MODELS_FOLDER)),
        *(*flags, "--max-replicas-per-model", "2"),
    )
    comes_true(first, lambda: state(first, "third") == "NODE_STATE_LIVE", lambda: third.said(process))
    spec = TINY.replace("zone: shared", "zone: third").replace("name: tiny", "name: other")
    assert first.run("apply", "-f", "-", text=spec).returncode == 0
    exhausted = "every port from 9710 to 9710 is in use"
    comes_true(first, lambda: exhausted in first.run("status").stdout, lambda: first.run("status").stdout)
    assert list(ready(first, "other").values()) == [f"{SECOND_TOO}:9710"]
    said = first.run("generate", "other", "The", "-n", "2")
    assert said.returncode == 0, said.stderr
    assert first.run("delete", "other").returncode == 0
    process.terminate()
    assert process.wait(timeout=30) == 0, third.said(process)


def test_when_the_cable_is_pulled_the_other_machine_serves_and_what_ran_is_taken_over_after(
    first: Any, second: Any, wire: tuple[str, str]
) -> None:
    """F27 F30: gone within the lease and a margin, no caller fails, and nothing is loaded again."""
    first.until(lambda: len(ready(first)) == 2)
    before = ready(first)
    replicas = {pid for pid, line in second.processes().items() if "localmesh.replica" in line}
    assert len(replicas) == 1
    ip("-n", wire[1], "link", "set", "lm0", "down")
    try:
        # called while the mesh still believes in the second machine, too
        assert set(first.asked(*operator(first), "4")) >= {"first-0"}
        first.until(lambda: state(first, "second") != "NODE_STATE_LIVE", seconds=20)
        assert set(first.asked(*operator(first), "4")) == {"first-0"}
        assert "second is away" in first.run("status").stdout
    finally:
        ip("-n", wire[1], "link", "set", "lm0", "up")
    first.until(lambda: ready(first) == before)
    assert {pid for pid, line in second.processes().items() if "localmesh.replica" in line} == replicas
    assert second.said(second.process).count("starts") == 1
    first.until(lambda: "second" in first.asked(*operator(first), "4"))


def test_what_up_wrote_down_about_itself_is_private(first: Any) -> None:
    """F60: keys and tokens are for their owner only."""
    private = [first.state / "up.json", *(first.state / "ca").iterdir(), *(first.state / "tls").rglob("*.pem")]
    assert len(private) > 6
    assert all(path.stat().st_mode & 0o077 == 0 for path in private), private
    assert json.loads((first.state / "up.json").read_text())["registry"].startswith(FIRST)
