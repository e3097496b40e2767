"""Bad input: each gets a status code, a reason, a sentence that helps, and leaves nothing behind."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from localmesh.testing import MODELS_FOLDER

HEAD = "apiVersion: localmesh/v1\nkind: Model\n"


def failure(mesh, *words: str, text: str = ""):
    """Run a command that must fail; return its exit code and its error document."""
    done = mesh.run(*words, "-o", "json", text=text)
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    assert error["exitCode"] == done.returncode
    return done.returncode, error


def declare(mesh, text: str) -> None:
    done = mesh.run("apply", "-f", "-", text=HEAD + text)
    assert done.returncode == 0, done.stderr


def test_an_unknown_model_is_not_found(mesh) -> None:
    for words in (["generate", "nobody", "x"], ["embed", "nobody", "x"], ["models", "nobody"], ["delete", "nobody"]):
        code, error = failure(mesh, *words)
        assert (code, error["reason"]) == (4, "MODEL_NOT_FOUND")
        assert "nobody" in error["message"]


def test_a_person_is_told_what_to_do_next(mesh) -> None:
    done = mesh.run("generate", "nobody", "x")
    assert "nobody" in done.stderr
    assert "localmesh models" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("engine: llama\nname: x\nsorce: tiny.gguf\n", ["stdin:5", "sorce", "source"]),
        ("engine: llama\nname: x\nparameters: {slots: many}\n", ["stdin:5", "slots"]),
        ("engine: llama\n", ["name"]),
        ("engine: llama\nname: 'a b'\n", ["stdin:4", "name"]),
        ("name: [\n", ["stdin:", "not YAML"]),
    ],
)
def test_bad_yaml_names_line_and_field(mesh, text: str, words: list[str]) -> None:
    code, error = failure(mesh, "apply", "-f", "-", text=HEAD + text)
    assert (code, error["reason"]) == (5, "INVALID_SPEC")
    assert all(word in error["message"] for word in words), error["message"]


def test_a_manifest_that_is_not_there_is_named(mesh) -> None:
    code, error = failure(mesh, "apply", "-f", "none.yaml")
    assert code == 5
    assert "none.yaml" in error["message"]


def test_an_unknown_engine_is_refused_with_those_that_there_are(mesh) -> None:
    code, error = failure(mesh, "apply", "-f", "-", text=HEAD + "name: x\nengine: lama\n")
    assert (code, error["reason"]) == (5, "INVALID_SPEC")
    assert "llama" in error["message"]


def test_a_backend_that_no_node_has_says_so(mesh) -> None:
    declare(mesh, "name: no-backend\nengine: process:nowhere\n")
    code, error = failure(mesh, "generate", "no-backend", "x")
    assert (code, error["reason"]) == (7, "ENGINE_UNAVAILABLE")
    assert "nowhere" in error["message"]
    mesh.run("delete", "no-backend")


def test_a_missing_file_is_named_with_its_path(mesh) -> None:
    declare(mesh, "name: no-file\nengine: llama\nsource: sub/missing.gguf\n")
    code, error = failure(mesh, "generate", "no-file", "x")
    assert (code, error["reason"]) == (7, "SOURCE_MISSING")
    assert str(MODELS_FOLDER / "sub/missing.gguf") in error["message"]
    mesh.run("delete", "no-file")


def test_a_model_that_fits_nowhere_says_for_each_node_why(mesh) -> None:
    declare(mesh, "name: huge\nengine: llama\nsource: tiny.gguf\nresources: {memory: 900TiB}\n")
    code, error = failure(mesh, "generate", "huge", "x")
    assert (code, error["reason"]) == (6, "NO_CAPACITY")
    for node in mesh.json("nodes")["nodes"]:
        assert node["name"] in error["message"]
    mesh.run("delete", "huge")


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(mesh) -> None:
    declare(mesh, "name: short\nengine: llama\nsource: tiny.gguf\nparameters: {context_tokens: 256}\n")
    code, error = failure(mesh, "generate", "short", "word " * 2000)
    assert (code, error["reason"]) == (5, "PROMPT_TOO_LONG")
    assert error["metadata"]["context_tokens"] == "256"
    assert int(error["metadata"]["prompt_tokens"]) > 256
    mesh.run("delete", "short")


def test_what_an_engine_cannot_do_is_said(mesh) -> None:
    declare(mesh, "name: text-only\nengine: llama\nsource: tiny.gguf\n")
    code, error = failure(mesh, "embed", "text-only", "x")
    assert (code, error["reason"]) == (7, "CAPABILITY_UNSUPPORTED")
    mesh.run("delete", "text-only")


def test_a_mesh_that_is_not_there_is_unreachable(sandbox) -> None:
    done = sandbox.run("status", "--router", "127.0.0.1:9", "--registry", "127.0.0.1:9")
    assert done.returncode == 3
    assert "127.0.0.1:9" in done.stderr
    assert "localmesh up" in done.stderr


@pytest.mark.parametrize("role", ["registry", "router"])
def test_a_component_says_that_etcd_cannot_be_reached(sandbox, role: str) -> None:
    done = sandbox.run(role, "--etcd-endpoints", "127.0.0.1:9", "--listen", "127.0.0.1:0")
    assert done.returncode == 3, done.stderr
    assert "etcd at 127.0.0.1:9" in done.stderr
    assert "--etcd-endpoints" in done.stderr
    assert "Traceback" not in done.stderr
    sandbox.assert_nothing_left()


def test_a_port_in_use_is_one_sentence(sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = ("--router-listen", f"127.0.0.1:{port}", "--registry-listen", "127.0.0.1:0")
        done = sandbox.run("up", *ports)
    assert done.returncode not in (0, 2)
    assert f"port {port} of 127.0.0.1 is in use" in done.stderr
    assert "Traceback" not in done.stderr
    sandbox.assert_nothing_left()


def test_an_open_address_without_tls_is_refused(sandbox) -> None:
    done = sandbox.run("up", "--router-listen", "0.0.0.0:0", "--registry-listen", "127.0.0.1:0")
    assert done.returncode != 0
    assert "TLS" in done.stderr
    assert "--insecure" in done.stderr
    sandbox.assert_nothing_left()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["router", "--listen", "nonsense"], "not an address"),
        (["worker", "--memory-budget", "much"], "not a memory budget"),
        (["worker", "--replica-ports", "9-1"], "not a range of ports"),
        (["worker", "--name", "a b"], "not a node name"),
        (["up", "--workers", "many"], "expected a whole number"),
        (["router", "--tls-cert", "/none", "--tls-key", "/none", "--tls-ca", "/none"], "/none"),
        (["router", "--tls-cert", "/none"], "tls"),
        (["up", "--etcd-bin", "/none"], "/none is not an executable file"),
        (["up", "--mesh", "a/b"], "a/b"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(sandbox, words: list[str], said: str) -> None:
    etcd = () if words[0] == "up" else ("--etcd-endpoints", "127.0.0.1:9")
    done = sandbox.run(*words, *(etcd if words[0] != "worker" else ()))
    assert done.returncode in (1, 2, 3, 7), done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    sandbox.assert_nothing_left()


@pytest.fixture(scope="module")
def broken(make_sandbox):
    """Yield a mesh of its own, with models and backends that break."""
    box = make_sandbox()
    models = box.folder / "models"
    models.mkdir()
    whole = (MODELS_FOLDER / "tiny.gguf").read_bytes()
    (models / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (models / "noise.gguf").write_bytes(os.urandom(4096))
    shutil.copy(MODELS_FOLDER / "tiny.gguf", models / "good.gguf")
    for name, script in {
        "dies": "echo the disk is on fire >&2; exit 3",
        "hangs": "exec sleep 1000",
    }.items():
        folder = box.folder / "backends" / name
        folder.mkdir(parents=True)
        (folder / "run.sh").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "run.sh").chmod(0o755)
    box.up("--models-dir", str(models), "--backends-dir", str(box.folder / "backends"))
    yield box
    box.close()


@pytest.mark.parametrize("file", ["cut.gguf", "noise.gguf"])
def test_a_corrupt_file_fails_with_a_reason_and_frees_its_memory(broken, file: str) -> None:
    name = file.replace(".", "-")
    declare(broken, f"name: {name}\nengine: llama\nsource: {file}\n")
    code, error = failure(broken, "generate", name, "x")
    assert code == 7
    assert error["reason"] in ("LOAD_FAILED", "SOURCE_MISSING")
    assert file in error["message"]
    broken.run("delete", name)
    nothing_claimed(broken)


def test_a_backend_that_dies_at_start_gives_its_last_words(broken) -> None:
    """F46: failure with its last stderr lines."""
    declare(broken, "name: dies\nengine: process:dies\nresources: {memory: 1MiB}\n")
    code, error = failure(broken, "generate", "dies", "x")
    assert (code, error["reason"]) == (7, "LOAD_FAILED")
    assert "the disk is on fire" in error["message"]
    shown = broken.run("models", "dies").stdout
    assert "LOAD_FAILED" in shown
    broken.run("delete", "dies")
    nothing_claimed(broken)


def test_a_backend_that_hangs_leaves_the_caller_with_progress_and_no_process(broken) -> None:
    declare(broken, "name: hangs\nengine: process:hangs\nresources: {memory: 1MiB}\n")
    code, error = failure(broken, "generate", "hangs", "x", "--timeout-seconds", "4")
    assert code in (3, 6), error
    broken.run("delete", "hangs")
    broken.until(lambda: not any("sleep 1000" in line for line in broken.processes().values()))
    nothing_claimed(broken)


def test_a_good_model_still_works_beside_them(broken) -> None:
    declare(broken, "name: good\nengine: llama\nsource: good.gguf\n")
    said = broken.run("generate", "good", "The", "-n", "4")
    assert said.returncode == 0, said.stderr
    broken.run("delete", "good")


def nothing_claimed(box) -> None:
    def free() -> bool:
        nodes = box.json("nodes")["nodes"]
        return all(int(d["claimedBytes"]) == 0 for n in nodes for d in n["devices"])

    box.until(free)
    assert not list(Path(box.state).rglob("*.sock"))
