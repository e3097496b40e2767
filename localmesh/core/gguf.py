"""The header of a GGUF file, and how much memory the model in it will take.

`read_header` works on any seekable stream of bytes and trusts nothing in it: every count and length is checked against
the size of the file and against a limit before it is used, so that a hostile file costs a sentence, not memory or
time. Arrays longer than 4096 elements (vocabularies, merges) are skipped and remembered by their length.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import BinaryIO

_MAX_KEYS = 100_000
_MAX_TENSORS = 100_000
_MAX_ELEMENTS = 2_000_000
"""Array elements that are looked at one by one, in the whole header."""
_MAX_STRING = 16 << 20
_MAX_KEPT_BYTES = 64 << 20
_KEPT_ELEMENTS = 4096
_MAX_LAYERS = 4096
_MAX_COUNT = 1 << 40
"""No dimension, head count or context length of a real model is above this."""

_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, struct.Struct] = {
    code: struct.Struct("<" + letter)
    for code, letter in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
    }.items()
}  # fmt: skip
_U32, _U64 = _SCALARS[4], _SCALARS[10]

# ggml type -> (elements of a block, bytes of a block)
_BLOCKS: Mapping[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip
# Q4_0, Q4_K and IQ4_NL: the CPU engine copies these into a layout of its own
_REPACKED_TYPES = frozenset({2, 12, 20})

_CACHE_BYTES: Mapping[str, float] = {
    "": 2,
    "f32": 4,
    "f16": 2,
    "bf16": 2,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}
_FIXED_BYTES = 40 << 20
"""The process and its libraries."""
_DEFAULT_CONTEXT = 4096


class GgufError(ValueError):
    """The file is no GGUF that can be loaded; the message says why in a sentence."""


@dataclass(frozen=True, slots=True)
class SkippedArray:
    """Stands for an array that was too long to keep."""

    count: int
    longest: int = 0
    """Bytes of its longest text; 0 for an array of numbers."""


Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...] | SkippedArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the header says."""

    version: int
    metadata: Mapping[str, Value]
    tensor_count: int
    weights_bytes: int
    """Bytes of all tensors."""
    repacked: bool
    """Whether most weights are of a type that a CPU engine copies at load. The copy is what the process owns; the pages
    of the file can be taken back by the system, so the weights count once, but resident memory shows them twice."""

    @property
    def architecture(self) -> str:
        """Name of the architecture, such as "llama" or "bert"; empty if the file does not say."""
        name = self.metadata.get("general.architecture", "")
        return name if isinstance(name, str) else ""

    @property
    def context_length(self) -> int:
        """Tokens that the model was made for; 0 if the file does not say."""
        return _count(self, "context_length", default=0)

    @property
    def is_encoder(self) -> bool:
        """Whether every token sees all others, so that the model can embed but not generate."""
        return self.metadata.get(f"{self.architecture}.attention.causal") is False

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows; 0 if the file does not say."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, SkippedArray):
            return tokens.count
        return len(tokens) if isinstance(tokens, tuple) else 0

    @property
    def split_count(self) -> int:
        """Number of files that the model is split into; 1 for a whole one."""
        count = self.metadata.get("split.count", 1)
        return count if isinstance(count, int) and count > 0 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Memory that a replica will take, in bytes."""

    weights: int
    kv: int
    """Keys and values of the context."""
    compute: int
    """Scratch buffers of one batch."""
    fixed: int
    """The process and its libraries."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.compute + self.fixed

    @property
    def without_weights(self) -> int:
        """What a further replica takes on a CPU, where all replicas that map the same file share its weights."""
        return self.total - self.weights


def read_header(stream: BinaryIO) -> Header:
    """Read the header from the start of a seekable stream.

    Raises:
        GgufError: It is no GGUF, is damaged or truncated, or is of a version that nobody here can read.
        OSError: Reading failed.
    """
    reader = _Reader(stream)
    if (magic := reader.take(4, "the magic number")) != b"GGUF":
        raise GgufError(f"not a GGUF file: it begins with {magic!r} instead of b'GGUF'")
    version = reader.number(_U32, "the version")
    if version in (0x02000000, 0x03000000):
        raise GgufError("a big-endian GGUF file: convert it to little-endian")
    if version not in (2, 3):
        raise GgufError(f"GGUF version {version}: only 2 and 3 are known")
    tensors = reader.number(_U64, "the number of tensors")
    keys = reader.number(_U64, "the number of metadata keys")
    if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
        raise GgufError(f"a damaged GGUF header: {tensors} tensors and {keys} metadata keys")
    metadata = _read_metadata(reader, keys)
    weights, repacked = _read_tensors(reader, tensors, _alignment(metadata))
    return Header(
        version=version,
        metadata=MappingProxyType(metadata),
        tensor_count=tensors,
        weights_bytes=weights,
        repacked=repacked * 2 > weights,
    )


def effective_context(header: Header, context_tokens: int) -> int:
    """Return the tokens of a slot: what was asked for, or the model's own length, at most 4096, for 0.

    An encoder never gets more than its own length: its positions end there.
    """
    own = header.context_length or _DEFAULT_CONTEXT
    context = context_tokens or min(own, _DEFAULT_CONTEXT)
    return min(context, own) if header.is_encoder else context


def estimate(
    header: Header,
    *,
    context_tokens: int = 0,
    slots: int = 1,
    cache_type: str = "",
    embeddings: bool = False,
    ubatch: int = 512,
) -> Estimate:
    """Return the memory that a replica of the model will take.

    Args:
        header: The model.
        context_tokens: Tokens of each slot; 0 as for `effective_context`.
        slots: Requests computed at once; 0 is 1.
        cache_type: Type of the stored keys and values; empty is f16.
        embeddings: The model makes vectors instead of text; encoders always do.
        ubatch: Tokens computed in one go; an input to embed is always computed in one go.

    Raises:
        GgufError: The metadata lack what every model has, or have nonsense there; or the cache type is unknown.
    """
    if cache_type not in _CACHE_BYTES:
        raise GgufError(f"unknown cache type {cache_type!r}: one of {', '.join(k for k in _CACHE_BYTES if k)}")
    slots = max(1, slots)
    context = effective_context(header, context_tokens)
    width = _count(header, "embedding_length")
    feed_forward = max(_per_layer(header, "feed_forward_length", 1, default=4 * width))
    outputs = (header.vocabulary or 32_000) + 2 * width
    if embeddings or header.is_encoder:
        ubatch, outputs = max(ubatch, context), 0
    batch = min(ubatch, context * slots)
    mask = 4 * batch * _padded(context)
    compute = 4 * batch * max(2 * feed_forward + 4 * width, outputs) + mask
    result = Estimate(
        weights=header.weights_bytes,
        kv=_kv_bytes(header, context, slots, _CACHE_BYTES[cache_type], ubatch, width),
        compute=compute,
        fixed=_FIXED_BYTES,
    )
    if result.total >= 1 << 62:
        raise GgufError("a damaged GGUF header: the model would take more memory than there is in the world")
    return result


def _kv_bytes(header: Header, context: int, slots: int, bytes_per_element: float, ubatch: int, width: int) -> int:
    if header.is_encoder:
        return 0  # an encoder keeps nothing between batches
    layers = _count(header, "block_count")
    if layers > _MAX_LAYERS:
        raise GgufError(f"a damaged GGUF header: {layers} layers")
    heads = _per_layer(header, "attention.head_count", layers, default=0)
    kv_heads = _per_layer(header, "attention.head_count_kv", layers, default=max(heads))
    if not max(heads):
        return 0  # no attention at all
    key_length = _count(header, "attention.key_length", default=width // max(heads))
    value_length = _count(header, "attention.value_length", default=width // max(heads))
    if lora_rank := _count(header, "attention.kv_lora_rank", default=0):
        # multi-head latent attention: one compressed key for each token, no values
        kv_heads, key_length, value_length = (1,) * layers, lora_rank + _count(header, "rope.dimension_count"), 0
    window = _count(header, "attention.sliding_window", default=0)
    pattern = header.metadata.get(f"{header.architecture}.attention.sliding_window_pattern")
    cells = slots * _padded(context)
    local_cells = min(cells, _padded(window * slots + ubatch))
    total = 0.0
    for layer in range(layers):
        here = local_cells if window and _is_local(pattern, layer) else cells
        total += here * kv_heads[layer] * (key_length + value_length) * bytes_per_element
    return int(total)


def _is_local(pattern: Value | None, layer: int) -> bool:
    """Whether the layer looks at a sliding window only."""
    if isinstance(pattern, tuple):
        return layer < len(pattern) and bool(pattern[layer])
    # every nth layer is a global one
    return isinstance(pattern, int) and pattern > 0 and (layer + 1) % pattern != 0


def _padded(tokens: int) -> int:
    return -(-tokens // 256) * 256


def _count(header: Header, key: str, *, default: int | None = None) -> int:
    """Return a metadata value of the architecture that must be a whole number of a plausible size."""
    full = f"{header.architecture}.{key}"
    value = header.metadata.get(full, default)
    if value is None:
        raise GgufError(f"a GGUF file without {full}: it is no model that can be loaded")
    return _checked(full, value)


def _per_layer(header: Header, key: str, layers: int, *, default: int) -> tuple[int, ...]:
    """Return a value that may be one number for all layers or a list."""
    full = f"{header.architecture}.{key}"
    value = header.metadata.get(full, default)
    if not isinstance(value, tuple):
        return (_checked(full, value),) * max(1, layers)
    if len(value) < layers or not value:
        raise GgufError(f"a damaged GGUF header: {full} has {len(value)} entries for {layers} layers")
    return tuple(_checked(full, entry) for entry in value)


def _checked(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_COUNT:
        shown = value if isinstance(value, int | float | bool) else type(value).__name__
        raise GgufError(f"a damaged GGUF header: {key} is {shown}")
    return value


def _alignment(metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1 << 20 or value & (value - 1):
        raise GgufError(f"a damaged GGUF header: general.alignment is {value!r:.40}")
    return value


def _read_metadata(reader: "_Reader", keys: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(keys):
        key = reader.string("a metadata key")
        if key in metadata:
            raise GgufError(f"a damaged GGUF header: the key {key[:80]!r} is there twice")
        metadata[key] = reader.value(reader.number(_U32, "a value's type"), key)
    return metadata


def _read_tensors(reader: "_Reader", tensors: int, alignment: int) -> tuple[int, int]:
    """Return the bytes of all tensors and of those that a CPU engine copies; check that the file holds them."""
    total = repacked = end = 0
    all_known = True
    for _ in range(tensors):
        name = reader.string("a tensor's name")
        dimensions = reader.number(_U32, "a tensor's number of dimensions")
        if dimensions > 8:
            raise GgufError(f"a damaged GGUF header: the tensor {name[:80]!r} has {dimensions} dimensions")
        elements = math.prod(reader.number(_U64, "a tensor's dimension") for _ in range(dimensions))
        kind = reader.number(_U32, "a tensor's type")
        offset = reader.number(_U64, "a tensor's place")
        if elements > _MAX_COUNT:
            raise GgufError(f"a damaged GGUF header: the tensor {name[:80]!r} has {elements} elements")
        if (block := _BLOCKS.get(kind)) is None:
            all_known = False  # newer than this table; the engine may know it
            end = max(end, offset)
            continue
        size = elements // block[0] * block[1]
        total += size
        repacked += size if kind in _REPACKED_TYPES else 0
        end = max(end, offset + size)
    start = -(-reader.position // alignment) * alignment
    if start + end > reader.size and end:
        raise GgufError(f"a truncated GGUF file: its tensors end at byte {start + end}, the file at {reader.size}")
    return (total if all_known else reader.size - start), repacked


class _Reader:
    """Reads little-endian values, never beyond the end of the stream nor beyond the limits."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.size = stream.seek(0, 2)
        self.position = stream.seek(0)
        self._elements = 0
        self._kept = 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            raise GgufError(f"a truncated GGUF file: it ends at byte {self.size} within {what}")
        data = self._stream.read(count)
        if len(data) != count:
            raise GgufError(f"a truncated GGUF file: it ends within {what}")
        self.position += count
        return data

    def skip(self, count: int, what: str) -> None:
        if count > self.size - self.position:
            raise GgufError(f"a truncated GGUF file: it ends at byte {self.size} within {what}")
        self.position = self._stream.seek(count, 1)

    def number(self, form: struct.Struct, what: str) -> int:
        return int(form.unpack(self.take(form.size, what))[0])

    def string(self, what: str) -> str:
        length = self.number(_U64, what)
        if length > _MAX_STRING:
            raise GgufError(f"a damaged GGUF header: {what} is {length} bytes long")
        self._kept += length
        if self._kept > _MAX_KEPT_BYTES:
            raise GgufError(f"a damaged GGUF header: more than {_MAX_KEPT_BYTES} bytes of texts")
        return self.take(length, what).decode("utf-8", "replace")

    def value(self, kind: int, key: str) -> Value:
        if kind == _ARRAY:
            return self._array(key)
        return self._scalar(kind, key)

    def _scalar(self, kind: int, key: str) -> Scalar:
        what = f"the value of {key[:80]!r}"
        if kind == _STRING:
            return self.string(what)
        form = _SCALARS.get(kind)
        if form is None:
            raise GgufError(f"a damaged GGUF header: {what} is of the unknown type {kind}")
        value: Scalar = form.unpack(self.take(form.size, what))[0]
        return value

    def _array(self, key: str) -> Value:
        what = f"the array {key[:80]!r}"
        kind = self.number(_U32, what)
        count = self.number(_U64, what)
        if kind == _ARRAY:
            raise GgufError(f"a damaged GGUF header: {what} holds arrays, which no engine reads")
        if kind != _STRING and kind not in _SCALARS:
            raise GgufError(f"a damaged GGUF header: {what} is of the unknown type {kind}")
        if count <= _KEPT_ELEMENTS or kind == _STRING:
            self._elements += count
            if self._elements > _MAX_ELEMENTS:
                raise GgufError(f"a damaged GGUF header: {what} has {count} elements")
        if count <= _KEPT_ELEMENTS:
            return tuple(self._scalar(kind, key) for _ in range(count))
        longest = 0
        if kind == _STRING:
            for _ in range(count):
                size = self.number(_U64, what)
                longest = max(longest, size)
                self.skip(size, what)
        else:
            self.skip(_SCALARS[kind].size * count, what)
        return SkippedArray(count, longest)
