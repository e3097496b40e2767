"""Test kit: a whole mesh on loopback, a manual clock, and a small real model."""

from localmesh.testing.clock import ManualClock
from localmesh.testing.local_mesh import LocalMesh, for_model
from localmesh.testing.sample_models import (
    MINILM_PACKAGE,
    MINILM_SOURCE,
    MODELS_FOLDER,
    TINY_SOURCE,
    minilm_spec,
    tiny_spec,
)

__all__ = [
    "MINILM_PACKAGE",
    "MINILM_SOURCE",
    "MODELS_FOLDER",
    "TINY_SOURCE",
    "LocalMesh",
    "ManualClock",
    "for_model",
    "minilm_spec",
    "tiny_spec",
]
