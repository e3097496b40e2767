"""The GGUF header: what it says, what the model will take, and that nothing in a file can hurt the reader."""

import contextlib
import io
import random
import struct
from typing import Any

import pytest

from localmesh.core import gguf
from localmesh.core.gguf import GgufError, Header, SkippedArray, effective_context, estimate, read_header

LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 2048,
}


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Return a value with its type in front."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    assert isinstance(value, list)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(_text(v) for v in value)
    return struct.pack("<IIQ", 9, 11, len(value)) + struct.pack(f"<{len(value)}q", *value)


def _file(
    metadata: dict[str, Any], tensors: list[tuple[str, list[int], int, int]] | None = None, *, data: int | None = None
) -> bytes:
    tensors = [("token_embd.weight", [64, 10], 0, 0)] if tensors is None else tensors
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += _text(key) + _value(value)
    for name, dims, kind, offset in tensors:
        out += _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    out += b"\0" * (-len(out) % 32)
    return out + b"\0" * (64 * 10 * 4 if data is None else data)


def _read(data: bytes) -> Header:
    return read_header(io.BytesIO(data))


def _header(**changes: Any) -> Header:
    metadata = LLAMA | {f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}
    return _read(_file(metadata))


def test_a_header_gives_the_metadata_and_the_size_of_the_weights() -> None:
    header = _read(_file(LLAMA | {"tokenizer.ggml.tokens": ["a", "b", "c"], "pi": 3.25, "yes": True}))
    assert header.architecture == "llama"
    assert header.context_length == 2048
    assert header.vocabulary == 3
    assert header.weights_bytes == 64 * 10 * 4
    assert header.metadata["pi"] == 3.25
    assert header.metadata["yes"] is True
    assert header.split_count == 1


def test_a_long_array_is_skipped_and_remembered_by_its_length() -> None:
    tokens = ["x"] * 4999 + ["\u00e9\u00e9"]
    header = _read(_file(LLAMA | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": list(range(5000))}))
    assert header.metadata["tokenizer.ggml.scores"] == SkippedArray(5000)
    assert header.metadata["tokenizer.ggml.tokens"] == SkippedArray(5000, longest=4)
    assert header.vocabulary == 5000


def test_block_sizes_agree_with_the_gguf_package() -> None:
    package = pytest.importorskip("gguf", reason="the extra 'engines' is not installed")
    sizes = {int(kind): size for kind, size in package.GGML_QUANT_SIZES.items()}
    never_stored = {9}  # Q8_1 exists in memory only, and the package counts it in an older layout
    ours = {kind: size for kind, size in gguf._BLOCKS.items() if kind not in never_stored}
    assert ours == {kind: size for kind, size in sizes.items() if kind in ours}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "truncated"),
        (b"GG", "truncated"),
        (b"PK\x03\x04" + b"\0" * 100, "not a GGUF file"),
        (b"GGUF" + struct.pack(">I", 3) + b"\0" * 16, "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 63), "damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1000), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _text("k") + struct.pack("<I", 99), "unknown type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _text("k") + struct.pack("<IIQ", 9, 9, 5), "holds arrays"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _text("k") + struct.pack("<IIQ", 9, 77, 5), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _text("k") + struct.pack("<IIQ", 9, 8, 1 << 40), "elements"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _text("k") + struct.pack("<IIQ", 9, 10, 1 << 60), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + (_text("k") + _value(1)) * 2, "twice"),
        (_file(LLAMA | {"general.alignment": 0}), "alignment"),
        (_file(LLAMA | {"general.alignment": 33}), "alignment"),
        (_file(LLAMA | {"general.alignment": "x"}), "alignment"),
        (_file(LLAMA, [("t", [1 << 40, 1 << 40], 0, 0)]), "elements"),
        (_file(LLAMA, [("t", [1] * 9, 0, 0)]), "9 dimensions"),
        (_file(LLAMA, [("t", [64, 10], 0, 1 << 63)]), "truncated"),
        (_file(LLAMA, data=64 * 10 * 4 - 1), "truncated"),
    ],
)
def test_a_bad_file_is_refused_with_a_sentence(data: bytes, expected: str) -> None:
    with pytest.raises(GgufError, match=expected):
        _read(data)


def test_every_truncation_of_a_good_file_is_refused() -> None:
    good = _file({"general.architecture": "llama", "names": ["a", "bc"]}, data=2560)
    for length in range(len(good)):
        with pytest.raises(GgufError):
            _read(good[:length])
    assert _read(good).tensor_count == 1


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_gives_a_header_or_a_sentence_and_nothing_else(seed: int) -> None:
    chance = random.Random(seed)
    good = _file(LLAMA | {"tokenizer.ggml.tokens": ["a"] * 20})
    for _ in range(20):
        data = bytearray(good)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(700)] = chance.randrange(256)
        with contextlib.suppress(GgufError):
            assert estimate(_read(bytes(data)), slots=2).total > 0


def test_a_tensor_type_newer_than_the_table_counts_by_the_size_of_the_file() -> None:
    header = _read(_file(LLAMA, [("t", [64, 10], 1234, 0)], data=5000))
    assert header.weights_bytes == 5000


def test_types_that_a_cpu_engine_copies_are_noted() -> None:
    assert _read(_file(LLAMA, [("t", [64, 10], 2, 0)])).repacked
    assert not _read(_file(LLAMA, [("t", [64, 10], 8, 0)])).repacked


def test_the_estimate_counts_keys_and_values_of_every_slot() -> None:
    """F29: the estimate before the load."""
    header = _header()
    one = estimate(header, context_tokens=1000)
    # 1024 cells, 2 layers, 2 heads, 16 + 16 elements of 2 bytes
    assert one.kv == 1024 * 2 * 2 * 32 * 2
    assert one.weights == header.weights_bytes
    assert estimate(header, context_tokens=1000, slots=4).kv == 4 * one.kv
    assert estimate(header, context_tokens=1000, cache_type="q8_0").kv == one.kv * 34 // 64
    assert one.total == one.weights + one.kv + one.compute + one.fixed
    assert one.without_weights == one.total - one.weights


def test_no_context_asked_for_means_the_models_own_but_at_most_4096() -> None:
    assert effective_context(_header(), 0) == 2048
    assert effective_context(_header(context_length=131072), 0) == 4096
    assert effective_context(_header(context_length=131072), 9000) == 9000


def test_an_encoder_keeps_no_keys_and_values() -> None:
    assert estimate(_header(attention__causal=False)).kv == 0


def test_an_encoder_never_gets_more_context_than_it_has_positions() -> None:
    assert effective_context(_header(attention__causal=False, context_length=512), 9000) == 512


def test_embedding_computes_a_whole_input_in_one_go_and_has_no_token_scores() -> None:
    header = _header()
    generating = estimate(header, context_tokens=2048)
    embedding = estimate(header, context_tokens=2048, embeddings=True)
    assert embedding.compute == 4 * 2048 * (2 * 128 + 4 * 64) + 4 * 2048 * 2048
    assert generating.compute == 4 * 512 * (32_000 + 2 * 64) + 4 * 512 * 2048
    assert embedding.kv == generating.kv


def test_sliding_window_layers_keep_their_window_only() -> None:
    full = estimate(_header(context_length=8192), context_tokens=8192).kv
    windowed = _header(attention__sliding_window=512, attention__sliding_window_pattern=2)
    assert estimate(windowed, context_tokens=8192).kv == full // 2 + full // 2 * 1024 // 8192


def test_latent_attention_keeps_one_compressed_key() -> None:
    header = _header(attention__kv_lora_rank=24, rope__dimension_count=8)
    assert estimate(header, context_tokens=256).kv == 256 * 2 * 32 * 2


def test_heads_may_differ_between_layers() -> None:
    assert estimate(_header(attention__head_count_kv=[2, 4]), context_tokens=256).kv == 256 * (2 + 4) * 32 * 2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"block_count": 1 << 50}, "block_count"),
        ({"block_count": 5000}, "5000 layers"),
        ({"block_count": -1}, "block_count"),
        ({"embedding_length": "wide"}, "embedding_length is str"),
        ({"attention__head_count_kv": [2]}, "1 entries for 2 layers"),
        ({"attention__head_count": 1.5}, "head_count is 1.5"),
        ({"feed_forward_length": []}, "0 entries"),
    ],
)
def test_nonsense_in_the_metadata_is_named(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(GgufError, match=expected):
        estimate(_header(**changes))


def test_a_file_without_an_architecture_is_no_model() -> None:
    with pytest.raises(GgufError, match="embedding_length"):
        estimate(_read(_file({"general.name": "x"})))


def test_an_unknown_cache_type_is_refused() -> None:
    with pytest.raises(GgufError, match="unknown cache type 'q3'"):
        estimate(_header(), cache_type="q3")
