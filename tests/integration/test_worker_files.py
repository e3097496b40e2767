"""What the worker reads and keeps in files: models' sources, engines, the node's key, replicas' output."""

import os
import stat
import sys
from importlib import metadata
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from localmesh.core.ids import ModelName
from localmesh.core.records import ModelSpec
from localmesh.rpc.authority import CertificateAuthority
from localmesh.rpc.errors import ConfigError
from localmesh.testing import MODELS_FOLDER
from localmesh.worker import engines
from localmesh.worker.identity import certificate_identity, certificate_request, load_or_create
from localmesh.worker.launch import ReplicaFolder
from localmesh.worker.sources import CatalogItem, SourceBook, SourceProblem, facts, resolve

MIB = 1 << 20


def spec(source: str, backend: str = "llama", **more: int) -> ModelSpec:
    return ModelSpec(name=ModelName("m"), backend=backend, source=source, **more)  # type: ignore[arg-type]


def item(source: str, backend: str = "llama", **more: int) -> CatalogItem:
    return CatalogItem(revision="r", spec=spec(source, backend, **more))


def test_a_source_is_a_path_inside_the_models_folder(tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "a").mkdir(parents=True)
    (models / "a/m.gguf").write_bytes(b"x")
    (models / "inside").symlink_to(models / "a")
    assert resolve(spec("inside/m.gguf"), models_dir=models) == (models / "a/m.gguf").resolve()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("../secret", "must be a path inside the models folder"),
        ("/etc/passwd", "must be a path inside the models folder"),
        ("a/../../secret", "must be a path inside the models folder"),
        ("outside/secret", "outside of the models folder"),
        ("loop", "there is no"),
        ("not/there.gguf", "there is no"),
        ("", "is not a path"),
        ("a\0b", "is not a path"),
        ("pip:no_such_package_at_all", "is not installed here"),
        ("pip:not a package/x", "not a Python package"),
        ("pip:", "not a Python package"),
        ("pip:json/../../secret", "must be a path inside"),
        ("pip:json/no.gguf", "there is no"),
    ],
)
def test_what_leads_elsewhere_or_nowhere_is_refused(tmp_path: Path, source: str, words: str) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (tmp_path / "secret").write_text("s")
    (models / "outside").symlink_to(tmp_path)
    (models / "loop").symlink_to(models / "loop")
    with pytest.raises(SourceProblem, match=words):
        resolve(spec(source), models_dir=models)


def test_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "localmesh_test_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "model.gguf").write_bytes(b"x")
    monkeypatch.syspath_prepend(tmp_path)
    found = resolve(spec("pip:localmesh-test-weights/model.gguf"), models_dir=tmp_path)
    assert found == package / "model.gguf"
    assert "localmesh_test_weights" not in sys.modules


def test_a_foreign_backend_gets_a_source_that_is_no_file_as_it_is(tmp_path: Path) -> None:
    assert resolve(spec("org/some-model", "process:x"), models_dir=tmp_path) is None
    found = facts(item("org/some-model", "process:x", memory_bytes=5), models_dir=tmp_path)
    assert (found.present, found.path, found.memory_bytes) == (True, "org/some-model", 5)


def test_a_folder_for_a_foreign_backend_counts_with_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "m/sub").mkdir(parents=True)
    (tmp_path / "m/sub/w.bin").write_bytes(b"x" * 1000)
    found = facts(item("m", "process:x"), models_dir=tmp_path)
    assert found.weights_bytes == 1000
    assert found.memory_bytes == 1200 + 512 * MIB


def test_sentence_weights_are_estimated_from_their_size(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    assert "safetensors" in facts(item("m", "minilm"), models_dir=tmp_path).problem
    (tmp_path / "m/model.safetensors").write_bytes(b"x" * 1000)
    found = facts(item("m", "minilm"), models_dir=tmp_path)
    assert (found.present, found.weights_bytes, found.memory_bytes) == (True, 1000, 1200 + 60 * MIB)


def test_a_text_model_that_makes_vectors_is_estimated_as_one() -> None:
    """F29: a text to embed is computed in one go, however long."""
    text = facts(item("tiny.gguf", context_tokens=2048), models_dir=MODELS_FOLDER)
    vectors = facts(item("tiny.gguf", context_tokens=2048, embeddings=True), models_dir=MODELS_FOLDER)
    assert vectors.memory_bytes > text.memory_bytes > 0


def test_a_file_that_is_no_gguf_is_not_present_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"<html>404</html>")
    found = facts(item("m.gguf"), models_dir=tmp_path)
    assert not found.present
    assert found.path == str(tmp_path / "m.gguf")
    assert "not a GGUF file" in found.problem
    (tmp_path / "folder").mkdir()
    assert "is a folder" in facts(item("folder"), models_dir=tmp_path).problem


def test_a_file_is_looked_at_again_only_when_it_changed(tmp_path: Path) -> None:
    book, weights = SourceBook(tmp_path), tmp_path / "m/w.safetensors"
    catalog = [item("m", "minilm")]
    name = ModelName("m")
    assert not book.look(catalog)[name].present
    weights.parent.mkdir()
    weights.write_bytes(b"x" * 10)
    first = book.look(catalog)[name]
    assert first.weights_bytes == 10
    assert book.look(catalog)[name] is first
    weights.write_bytes(b"x" * 20)
    assert book.look(catalog)[name].weights_bytes == 20
    assert book.look([]) == {}


async def test_installed_engines_are_probed_in_a_child_process(tmp_path: Path) -> None:
    found = {e.name: e for e in await engines.probe(tmp_path, gpus=True, environment={"PATH": os.defpath})}
    try:
        version = metadata.version("xllamacpp")
    except metadata.PackageNotFoundError:
        assert not found["llama"].available
    else:
        assert found["llama"].available
        assert version in found["llama"].detail


async def test_an_engine_whose_process_dies_is_not_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_PROBE", "import os; os.abort()")
    monkeypatch.setattr(engines, "_version", lambda name: "9.9")
    llama = (await engines.probe(tmp_path, gpus=False, environment={}))[0]
    assert (llama.available, llama.device_kinds) == (False, ())
    assert "does not start here" in llama.detail


async def test_an_engine_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_PROBE", "import signal; signal.pause()")
    monkeypatch.setattr(engines, "_version", lambda name: "9.9")
    monkeypatch.setattr(engines, "_PROBE_SECONDS", 0.2)
    ability = await engines.llama_ability({})
    assert "does not answer" in ability.problem


def test_foreign_backends_are_folders_with_a_script_that_runs(tmp_path: Path) -> None:
    for name, mode in (("good", 0o755), ("bad", 0o644)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.sh").write_text("#!/bin/sh\n")
        (tmp_path / name / "run.sh").chmod(mode)
    (tmp_path / "empty").mkdir()
    found = {e.name: e for e in engines.process_engines(tmp_path, gpus=True)}
    assert found.keys() == {"process:good", "process:bad"}
    assert found["process:good"].available
    assert found["process:good"].device_kinds == ("cpu", "gpu")
    assert "chmod" in found["process:bad"].detail
    assert engines.process_engines(tmp_path / "nowhere", gpus=False) == ()


def test_the_node_s_key_is_made_once_and_private(tmp_path: Path) -> None:
    """F1."""
    first = load_or_create(tmp_path / "state")
    again = load_or_create(tmp_path / "state")
    assert first == again
    assert stat.S_IMODE(first.key_path.stat().st_mode) == 0o600
    assert [p.name for p in first.key_path.parent.iterdir()] == ["node-key.pem"]
    assert len(first.fingerprint) == 64
    assert load_or_create(tmp_path / "other").fingerprint != first.fingerprint


def test_a_certificate_is_asked_for_with_the_node_s_key(tmp_path: Path) -> None:
    """F1."""
    identity = load_or_create(tmp_path)
    request = x509.load_der_x509_csr(certificate_request(identity, node="n1"))
    assert request.is_signature_valid
    der = request.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert der == identity.public_key


def test_a_damaged_key_is_not_replaced(tmp_path: Path) -> None:
    """F1."""
    (tmp_path / "node-key.pem").write_text("not a key")
    with pytest.raises(ConfigError, match="is not a private key"):
        load_or_create(tmp_path)
    assert (tmp_path / "node-key.pem").read_text() == "not a key"


def test_with_tls_the_node_is_who_its_certificate_says(tmp_path: Path) -> None:
    """F1."""
    authority = CertificateAuthority.create(tmp_path / "ca", "test")
    files = authority.issue_files(tmp_path / "node", "node", "n1")
    public = x509.load_pem_x509_certificate(files.cert.read_bytes()).public_key()
    identity = certificate_identity(files.cert, files.key)
    assert identity.public_key == public.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    with pytest.raises(ConfigError, match="not a PEM certificate"):
        certificate_identity(files.key, files.key)


def test_sockets_have_room_below_a_private_folder_wherever_the_run_folder_is(tmp_path: Path) -> None:
    """F46."""
    deep = ReplicaFolder(path=tmp_path.joinpath(*["deep" * 5] * 6))
    private = deep.prepare()
    try:
        assert len(str(private)) < 60
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
    finally:
        deep.clear(private)
    assert not private.exists()
