"""Writes GGUF files with random weights: any shape, no training, for tests of lifecycle, limits and memory."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

_BYTE_TOKENS = 256


def make_random_gguf(
    path: Path,
    *,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    feed_forward: int = 128,
    context: int = 2048,
    chat_template: bool = True,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F16,
) -> Path:
    """Write a llama of random weights with one token for each byte. It generates noise."""
    chance = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("random")
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_vocabulary(writer, chat_template=chat_template)

    def matrix(name: str, rows: int, columns: int) -> None:
        scale = 0.02 if "embd" in name else columns**-0.5
        values = chance.normal(0, scale, (rows, columns)).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, quantization), raw_dtype=quantization)

    matrix("token_embd.weight", 3 + _BYTE_TOKENS, width)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(layers):
        at = f"blk.{layer}."
        writer.add_tensor(f"{at}attn_norm.weight", np.ones(width, np.float32))
        writer.add_tensor(f"{at}ffn_norm.weight", np.ones(width, np.float32))
        matrix(f"{at}attn_q.weight", width, width)
        matrix(f"{at}attn_k.weight", kv_heads * width // heads, width)
        matrix(f"{at}attn_v.weight", kv_heads * width // heads, width)
        matrix(f"{at}attn_output.weight", width, width)
        matrix(f"{at}ffn_gate.weight", feed_forward, width)
        matrix(f"{at}ffn_up.weight", feed_forward, width)
        matrix(f"{at}ffn_down.weight", width, feed_forward)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: Any, *, chat_template: bool) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % i for i in range(_BYTE_TOKENS))])
    writer.add_token_scores([0.0] * (3 + _BYTE_TOKENS))
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    writer.add_token_types([*kinds, *[gguf.TokenType.BYTE] * _BYTE_TOKENS])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if chat_template:
        writer.add_chat_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ")
