"""Writes a tiny reranking model (BERT with a classifier head) of random weights, for tests of Rerank."""

from pathlib import Path

import gguf
import numpy as np

_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"\u2581{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
_SPECIAL = 5


def make_random_reranker(path: Path, *, layers: int = 2, width: int = 32, heads: int = 4, context: int = 64) -> Path:
    """Write it. Its vocabulary is single letters, each a word."""
    chance = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "bert")
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(heads)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(_WORDS)
    kinds = [gguf.TokenType.CONTROL if n < _SPECIAL else gguf.TokenType.NORMAL for n in range(len(_WORDS))]
    writer.add_token_types(kinds)
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_sep_token_id(3)
    writer.add_eos_token_id(3)
    writer.add_mask_token_id(4)

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(f"{name}.weight", chance.normal(0, 0.5, (rows, columns)).astype(np.float32))

    def linear(name: str, rows: int, columns: int) -> None:
        matrix(name, rows, columns)
        writer.add_tensor(f"{name}.bias", chance.normal(0, 0.1, rows).astype(np.float32))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(width, np.float32))

    matrix("token_embd", len(_WORDS), width)
    matrix("token_types", 2, width)
    matrix("position_embd", context, width)
    norm("token_embd_norm")
    for layer in range(layers):
        at = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            linear(at + name, width, width)
        norm(f"{at}attn_output_norm")
        linear(f"{at}ffn_up", 2 * width, width)
        linear(f"{at}ffn_down", width, 2 * width)
        norm(f"{at}layer_output_norm")
    linear("cls", width, width)
    linear("cls.output", 1, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
