"""Chooses the engine that a model's spec names."""

from pathlib import Path

from localmesh.core.errors import EngineUnavailable
from localmesh.core.replica_process import ReplicaSpecFile
from localmesh.replica.engines.base import Engine
from localmesh.replica.engines.llama import LlamaConfig, LlamaEngine


def create_engine(file: ReplicaSpecFile, limit: int) -> Engine:
    """Return the engine, not loaded yet.

    Raises:
        EngineUnavailable: There is no engine of that name.
    """
    if file.spec.backend == "llama":
        return LlamaEngine(
            LlamaConfig(
                spec=file.spec,
                model_path=Path(file.source_path),
                run_dir=Path(file.run_dir),
                limit=limit,
                gpu=file.gpu,
            )
        )
    raise EngineUnavailable(
        f"there is no engine {file.spec.backend!r}: the engines are llama, minilm and process:NAME.",
        engine=file.spec.backend,
    )
