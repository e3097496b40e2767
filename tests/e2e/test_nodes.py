"""Nodes as an operator cares for them, by the command."""

import json
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def strict(make_sandbox: Any) -> Iterator[Any]:
    """Yield a sandbox with a mesh that lets nobody in by itself, and whose node waits."""
    box = make_sandbox()
    try:
        box.up("--workers", "1", "--registry-approve", "manual", "--worker-memory-budget", "1GiB")
        yield box
    finally:
        box.close()


def only_node(box: Any) -> Any:
    (node,) = box.json("nodes")["nodes"]
    return node


def test_a_node_is_approved_cared_for_and_forgotten(strict: Any) -> None:
    """F2, F3, F6, F7, F8, F30, F32: the real worker's link registers by itself once it is approved."""
    waiting = only_node(strict)
    name = waiting["name"]
    assert waiting["state"] == "NODE_STATE_PENDING"
    listed = strict.run("nodes").stdout
    assert f"localmesh node approve {name}" in listed
    assert waiting["keyFingerprint"] in listed
    assert strict.run("node", "approve", name, "--key", "0" * 64).returncode == 5
    assert strict.run("node", "approve", "nobody").returncode == 4
    done = strict.run("node", "approve", name, "--key", waiting["keyFingerprint"])
    assert done.stdout.startswith(f"node {name} is approved"), done.stderr
    strict.until(lambda: only_node(strict)["state"] == "NODE_STATE_LIVE", seconds=10)

    assert strict.run("node", "cordon", name).stdout == f"node {name} is cordoned\n"
    assert only_node(strict)["state"] == "NODE_STATE_CORDONED"
    assert strict.json("node", "drain", name)["results"][name]["node"]["state"] == "NODE_STATE_DRAINING"
    strict.run("node", "uncordon", name)
    assert only_node(strict)["state"] == "NODE_STATE_DRAINING"
    strict.run("node", "resume", name)
    assert only_node(strict)["state"] == "NODE_STATE_LIVE"

    assert "zone=a" in strict.run("node", "label", name, "zone=a", "tier=x").stdout
    strict.run("node", "label", name, "tier-")
    node = only_node(strict)
    assert node["operatorLabels"] == {"zone": "a"}
    assert node["labels"]["node.name"] == name
    assert strict.run("node", "label", name, "nonsense").returncode == 5

    shown = strict.run("node", "override", name, "--max-replicas-per-model", "2", "--memory-budget", "512MiB").stdout
    assert "2 (worker: 1)" in shown
    assert "512 MiB (512MiB of" in shown
    assert "worker: 1.0 GiB" in shown
    assert only_node(strict)["devices"][0]["budgetBytes"] == str(512 << 20)
    strict.run("node", "override", name, "--reset", "all")
    assert only_node(strict)["devices"][0]["budgetBytes"] == str(1 << 30)
    assert strict.run("node", "override", name).returncode == 5
    assert strict.run("node", "override", name, "--memory-budget", "101%").returncode == 5

    assert strict.run("node", "remove", name).stdout == f"node {name} is forgotten\n"
    strict.until(lambda: only_node(strict)["state"] == "NODE_STATE_PENDING", seconds=10)
    failed = strict.run("node", "cordon", "nobody", "-o", "json")
    assert json.loads(failed.stderr)["error"]["reason"] == "NODE_NOT_FOUND"


def test_a_shared_secret_lets_the_mesh_s_own_worker_in(sandbox: Any) -> None:
    """F3."""
    sandbox.up("--workers", "1", env={"LOCALMESH_REGISTRY_JOIN_TOKEN": "open sesame 1234"})
    assert only_node(sandbox)["state"] == "NODE_STATE_LIVE"
