"""A foreign backend's whole life, as an operator leads it: upload, serve, look at its output, upgrade, delete."""

import json
import signal
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = """
apiVersion: localmesh/v1
kind: Model
name: foreign
engine: process:echo
resources: {memory: 64MiB}
placement: {min_replicas: 2}
"""


@pytest.fixture
def mesh(make_sandbox) -> Any:
    sandbox = make_sandbox()
    try:
        up = sandbox.up("--workers", "2")
        yield sandbox
        up.send_signal(signal.SIGINT)
        assert up.wait(timeout=60) == 0
        sandbox.assert_nothing_left()
    finally:
        sandbox.close()


def archive(folder: Path, word: str) -> Path:
    """Return an archive of the echo backend, that says a word of its own when it starts."""
    backend = folder / f"echo-{word}"
    backend.mkdir()
    (backend / "backend.py").write_text((ROOT / "tests/backends/echo/backend.py").read_text())
    script = f'#!/bin/sh\necho "{word} begins"\nexport PYTHONPATH={ROOT}\nexec {sys.executable} backend.py "$@"\n'
    (backend / "run.sh").write_text(script)
    (backend / "run.sh").chmod(0o755)
    path = folder / f"echo-{word}.tar.gz"
    with tarfile.open(path, "w:gz") as packed:
        packed.add(backend, "echo")
    return path


def test_a_backend_is_uploaded_serves_is_upgraded_under_load_and_deleted(mesh, tmp_path: Path) -> None:
    """F48, F49, F50, F46: through the command, with real processes, and nothing left at the end."""
    first, second = archive(tmp_path, "first"), archive(tmp_path, "second")
    nodes = sorted(node["name"] for node in mesh.json("nodes")["nodes"])
    assert "no backends" in mesh.run("backends").stdout
    ambiguous = mesh.run("backend", "install", "echo", "--archive", str(first))
    assert ambiguous.returncode == 5
    assert "--all-nodes" in ambiguous.stderr
    installed = mesh.run("backend", "install", "echo", "--archive", str(first), "--all-nodes")
    assert installed.returncode == 0, installed.stderr
    assert installed.stdout.count("installed on") == 2
    again = mesh.json("backend", "install", "echo", "--archive", str(first), "--node", nodes[0])
    assert again["results"][nodes[0]]["unchanged"]

    applied = mesh.run("apply", "-f", "-", text=MODEL)
    assert applied.returncode == 0, applied.stderr

    def routable() -> list[Any]:
        return [r for r in mesh.json("replicas", "foreign")["replicas"] if r["routable"]]

    mesh.until(lambda: len(routable()) == 2)
    said = mesh.run("generate", "foreign", "hello")
    assert said.returncode == 0, said.stderr
    assert "echo: hello" in said.stdout
    shown = mesh.run("backends").stdout
    assert shown.count("foreign#0") == 2, shown

    follow = mesh.start("logs", "foreign", "--follow")
    mesh.until(lambda: mesh.said(follow).count("first begins") == 2)
    refused = mesh.run("backend", "delete", "echo", "--node", nodes[0])
    assert refused.returncode == 7
    assert f"foreign/{nodes[0]}/0" in refused.stderr
    upgraded = mesh.run("backend", "upgrade", "echo", "--archive", str(second), "--all-nodes", timeout=120)
    assert upgraded.returncode == 0, upgraded.stderr
    assert upgraded.stdout.count("generation 2") == 2
    assert upgraded.stdout.count("stopped foreign#0") == 2
    # the stream goes on with the new processes, and the old ones' lines stay readable
    mesh.until(lambda: mesh.said(follow).count("second begins") == 2)
    mesh.until(lambda: len(routable()) == 2)
    lines = [json.loads(line) for line in mesh.run("logs", "foreign#0", "-o", "json").stdout.splitlines()]
    assert [line["line"] for line in lines if line["line"].endswith("begins")].count("first begins") == 2
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    nothing = mesh.run("logs", "foreign#5")
    assert nothing.returncode == 4
    assert "foreign#5" in nothing.stderr
    follow.send_signal(signal.SIGINT)
    assert follow.wait(timeout=20) == 130

    assert mesh.run("delete", "foreign").returncode == 0
    mesh.until(lambda: not mesh.json("replicas")["replicas"])
    assert mesh.run("backend", "delete", "echo", "--node", nodes[0]).returncode == 0
    rest = mesh.run("backend", "upgrade", "echo", "--archive", str(first), "--all-nodes")
    assert rest.stdout.count("upgraded") == 1, "a node without the backend is not touched"
    deleted = mesh.run("backend", "delete", "echo", "--all-nodes")
    assert deleted.returncode == 0, deleted.stderr
    assert "no backends" in mesh.run("backends").stdout
    mesh.until(lambda: not _engines(mesh))


def _engines(mesh) -> set[str]:
    found = {e["name"] for node in mesh.json("nodes")["nodes"] for e in node["engines"]}
    return {name for name in found if name.startswith("process:")}
