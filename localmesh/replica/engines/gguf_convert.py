"""Turns a folder of sentence-embedding weights (BERT, safetensors) into a GGUF.

Run as a process of its own, `python -m localmesh.replica.engines.gguf_convert FOLDER OUT PRECISION`, so that the memory
that this takes does not stay with the replica, and so that it can be stopped. It needs numpy, gguf and safetensors, no
torch. Progress and failure are JSON lines on stdout.

Several processes may convert the same folder at once: the first does it, under a lock on OUT.lock; the others wait and
find it done. OUT appears whole or not at all.
"""

import argparse
import ctypes
import fcntl
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_VERSION = 1
"""Part of the cache's names: raised when what is written changes."""
_NEEDED = ("config.json", "tokenizer.json", "model.safetensors")
PRECISIONS = ("f16", "q8_0", "f32")
_PR_SET_PDEATHSIG = 1


class ConvertError(Exception):
    """The folder cannot be converted; `reason` is the name of an error reason."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def cached_path(folder: Path, cache: Path, precision: str) -> Path:
    """Return where the conversion of a folder lies in the cache; another name when the folder has changed.

    Raises:
        ConvertError: A file is missing.
    """
    digest = hashlib.blake2b(f"{_VERSION} {precision}".encode(), digest_size=8)
    for name in _NEEDED:
        path = folder / name
        if not path.is_file():
            raise ConvertError("SOURCE_MISSING", f"there is no file {path}: a sentence-embedding model has one.")
        stat = path.stat()
        digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return cache / f"embedding-{digest.hexdigest()}.gguf"


def convert(folder: Path, out: Path, precision: str, progress: Callable[[int, int], None]) -> None:
    """Write the GGUF, unless another process has meanwhile.

    Raises:
        ConvertError: The folder holds something else, or the packages are missing.
        OSError: Reading or writing failed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if out.exists():
            return
        partial = out.with_suffix(
            ".partial"
        )  # ours alone while we have the lock; left over by a process that was killed
        _write(folder, partial, precision, progress)
        partial.replace(out)


def _write(folder: Path, out: Path, precision: str, progress: Callable[[int, int], None]) -> None:
    try:
        import gguf
        import safetensors
    except ImportError as error:
        raise ConvertError(
            "ENGINE_UNAVAILABLE",
            f"sentence embeddings need the package {error.name}. Install it with: pip install 'localmesh[engines]'.",
        ) from error
    try:
        config = json.loads((folder / "config.json").read_text())
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        writer = gguf.GGUFWriter(str(out), "bert")
        _add_shape(gguf, writer, config, folder.name, precision)
        _add_vocabulary(gguf, writer, config, tokenizer)
        _add_tensors(gguf, safetensors, writer, folder / "model.safetensors", config, precision, progress)
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ConvertError(
            "LOAD_FAILED", f"{folder} holds no BERT sentence-embedding model: {type(error).__name__}: {error}"
        ) from error
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(gguf: Any, writer: Any, config: dict[str, Any], name: str, precision: str) -> None:
    writer.add_name(name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    kind = "ALL_F32" if precision == "f32" else f"MOSTLY_{precision.upper()}"
    writer.add_file_type(getattr(gguf.LlamaFileType, kind))


def _add_vocabulary(gguf: Any, writer: Any, config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    """Add WordPiece in llama.cpp's spelling: words begin with U+2581, what continues a word does not."""
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda entry: entry[1])
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens, types = [], []
    for expected, (token, number) in enumerate(vocabulary):
        if number != expected:
            raise ValueError(f"the vocabulary has no token {expected}")
        if token in special or token.startswith("[unused"):
            tokens.append(token)
            types.append(gguf.TokenType.CONTROL if token in special else gguf.TokenType.UNUSED)
        else:
            tokens.append(token[2:] if token.startswith("##") else "\u2581" + token)
            types.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_type_count(config["type_vocab_size"])
    for token, name in (("[SEP]", "sep"), ("[PAD]", "pad"), ("[UNK]", "unk"), ("[MASK]", "mask")):
        if token in special:
            getattr(writer, f"add_{name}_token_id")(special[token])
    writer.add_bos_token_id(special["[CLS]"])
    writer.add_eos_token_id(special["[SEP]"])


def _add_tensors(
    gguf: Any,
    safetensors: Any,
    writer: Any,
    path: Path,
    config: dict[str, Any],
    precision: str,
    progress: Callable[[int, int], None],
) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config["num_hidden_layers"])
    kind = getattr(gguf.GGMLQuantizationType, precision.upper())
    total, done = path.stat().st_size, 0
    with safetensors.safe_open(str(path), "np") as weights:
        for name in weights.keys():  # noqa: SIM118 - a safetensors file is no mapping
            tensor = weights.get_tensor(name)
            done += tensor.nbytes
            progress(min(done, total), total)
            if name.startswith("pooler") or name.endswith("position_ids"):
                continue
            ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if ours is None:
                raise ValueError(f"the tensor {name} is not known")
            tensor = tensor.astype("float32")
            small = tensor.ndim != 2 or "token_types" in ours or "position" in ours
            if small or precision == "f32":
                writer.add_tensor(ours, tensor)
            else:
                writer.add_tensor(ours, gguf.quants.quantize(tensor, kind), raw_dtype=kind)


def main() -> int:
    """Convert; return 0, or 1 after a line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("precision", choices=PRECISIONS)
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        convert(arguments.folder, arguments.out, arguments.precision, _print_progress)
    except ConvertError as error:
        _print({"error": error.reason, "message": str(error)})
        return 1
    except OSError as error:
        _print({"error": "LOAD_FAILED", "message": f"converting {arguments.folder}: {error}"})
        return 1
    return 0


def _print_progress(done: int, total: int) -> None:
    _print({"done": done, "total": total})


def _print(line: dict[str, object]) -> None:
    os.write(sys.stdout.fileno(), (json.dumps(line) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
