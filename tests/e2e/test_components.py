"""Each component by itself: flags, variables and files, TLS, IPv6."""

import re
import signal
import ssl
import subprocess
from pathlib import Path

import pytest

from localmesh.rpc.authority import CertificateAuthority
from localmesh.rpc.tls import TlsFiles
from localmesh.testing import MODELS_FOLDER

MODEL = "apiVersion: localmesh/v1\nkind: Model\nname: tiny\nengine: llama\nsource: tiny.gguf\n"


class Parts:
    """A mesh put together by hand."""

    def __init__(self, box, etcd: str, mesh: str) -> None:
        self.box = box
        self.store = ("--etcd-endpoints", etcd, "--mesh", mesh)
        self.mesh = mesh

    def start(self, role: str, *words: str, env: dict[str, str] | None = None) -> str:
        """Start a component and return where it serves."""
        process = self.box.start(role, *words, env=env)
        pattern = re.compile(rf"^{role} serves at (\S+)", re.MULTILINE)
        self.box.until(lambda: pattern.search(self.box.said(process)) or process.poll() is not None)
        found = pattern.search(self.box.said(process))
        assert found is not None, self.box.said(process)
        return found[1]

    def stop(self) -> None:
        """Stop all, the last started first; each must end well."""
        for process in reversed(self.box.started):
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0, self.box.said(process)


@pytest.fixture
def parts(sandbox, etcd_endpoint: str, mesh_name: str) -> Parts:
    return Parts(sandbox, etcd_endpoint, mesh_name)


def flags(files: TlsFiles) -> list[str]:
    return ["--tls-cert", str(files.cert), "--tls-key", str(files.key), "--tls-ca", str(files.ca)]


def test_components_find_each_other_by_flags_variables_and_files(parts) -> None:
    """F1 F53 F58: the registry by flags, the router by variables, the worker by a file; over IPv6."""
    box = parts.box
    registry = parts.start("registry", "--listen", "[::1]:0", *parts.store)
    variables = {"LOCALMESH_ROUTER_LISTEN": "[::1]:0", "LOCALMESH_MESH": parts.mesh}
    router = parts.start("router", env=variables | {"LOCALMESH_ETCD_ENDPOINTS": parts.store[1]})
    file = box.folder / "worker.yaml"
    file.write_text(
        f"mesh: {parts.mesh}\nmodels_dir: {MODELS_FOLDER}\n"
        f"worker:\n  name: six\n  registries: ['{registry}']\n  listen: '[::1]:0'\n  labels: {{zone: a}}\n"
    )
    parts.start("worker", "--config", str(file))
    to = {"LOCALMESH_CLIENT_ROUTER": router, "LOCALMESH_CLIENT_REGISTRY": registry}
    assert box.run("apply", "-f", "-", text=MODEL, env=to).returncode == 0
    said = box.run("generate", "tiny", "The function returns", "-n", "4", env=to)
    assert said.returncode == 0, said.stderr
    shown = box.run("replicas", env=to).stdout
    assert "[::1]:" in shown
    assert "six" in shown
    parts.stop()
    box.assert_nothing_left()


def test_with_certificates_everything_is_mutual_and_new_ones_need_no_restart(parts, tmp_path: Path) -> None:
    """F60: by flags on every component and the command; a router's certificate is replaced while it runs."""
    box = parts.box
    authority = CertificateAuthority.create(tmp_path / "ca", parts.mesh)

    def issue(role: str, name: str) -> TlsFiles:
        return authority.issue_files(tmp_path / name, role, name)

    any_port = ("--listen", "127.0.0.1:0")
    registry = parts.start("registry", *any_port, *parts.store, *flags(issue("registry", "registry")))
    router = parts.start("router", *any_port, *parts.store, *flags(issue("router", "router")))
    node = ("--name", "node", "--registries", registry, "--mesh", parts.mesh, "--models-dir", str(MODELS_FOLDER))
    parts.start("worker", *node, *flags(issue("node", "node")))
    to = ("--router", router, "--registry", registry)
    me = flags(issue("operator", "me"))
    assert box.run("apply", "-f", "-", *to, *me, text=MODEL).returncode == 0
    ask = ("generate", "tiny", "The function returns", "-n", "4", *to)
    assert box.run(*ask, *me).returncode == 0

    host, _, port = router.rpartition(":")
    shown = ssl.get_server_certificate((host, int(port)))
    issue("router", "router")
    assert ssl.get_server_certificate((host, int(port))) != shown
    said = box.run(*ask, *me)
    assert said.returncode == 0, said.stderr

    assert box.run(*ask).returncode == 3  # plain text
    strangers = CertificateAuthority.create(tmp_path / "other-ca", parts.mesh)
    stranger = strangers.issue_files(tmp_path / "stranger", "operator", "stranger")
    assert box.run(*ask, *flags(stranger)).returncode == 3
    reader = flags(issue("client", "reader"))
    refused = box.run("apply", "-f", "-", *to, *reader, text=MODEL)
    assert refused.returncode == 8, refused.stderr
    assert "client/reader" in refused.stderr
    parts.stop()
    box.assert_nothing_left()


def test_a_node_may_not_speak_for_another(parts, tmp_path: Path) -> None:
    """F3 F60: the name in the certificate is the name that registers."""
    authority = CertificateAuthority.create(tmp_path / "ca", parts.mesh)
    files = authority.issue_files(tmp_path / "registry", "registry", "registry")
    registry = parts.start("registry", "--listen", "127.0.0.1:0", *parts.store, *flags(files))
    node = flags(authority.issue_files(tmp_path / "one", "node", "one"))
    worker: subprocess.Popen[str] = parts.box.start(
        *("worker", "--name", "two", "--registries", registry, "--mesh", parts.mesh, *node)
    )
    parts.box.until(lambda: "may not speak for the node two" in parts.box.said(worker))
    parts.stop()


def test_a_worker_without_a_registry_says_so_and_goes_on_trying(parts) -> None:
    process = parts.box.start("worker", "--registries", "127.0.0.1:9", "--name", "lonely")
    parts.box.until(lambda: "not registered yet at 127.0.0.1:9" in parts.box.said(process), seconds=40)
    assert process.poll() is None
    parts.stop()
    parts.box.assert_nothing_left()
