"""Chooses the engine that a model's spec names."""

from pathlib import Path

from localmesh.core.clock import Clock
from localmesh.core.errors import EngineUnavailable
from localmesh.core.replica_process import ReplicaSpecFile
from localmesh.replica.engines.base import Engine
from localmesh.replica.engines.llama import LlamaConfig, LlamaEngine
from localmesh.replica.engines.minilm import MinilmConfig, MinilmEngine
from localmesh.replica.engines.process import PREFIX, ProcessConfig, ProcessEngine


def create_engine(file: ReplicaSpecFile, limit: int, clock: Clock) -> Engine:
    """Return the engine, not loaded yet.

    Raises:
        EngineUnavailable: There is no engine of that name.
        LoadFailed: An option of the spec cannot be read.
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
    if file.spec.backend == "minilm":
        return MinilmEngine(
            MinilmConfig(
                spec=file.spec,
                folder=Path(file.source_path),
                cache_dir=Path(file.cache_dir),
                run_dir=Path(file.run_dir),
                limit=limit,
                gpu=file.gpu,
            )
        )
    if file.spec.backend.startswith(PREFIX):
        return ProcessEngine(
            ProcessConfig(
                spec=file.spec,
                backend_dir=Path(file.backend_dir),
                source_path=file.source_path,
                max_message_bytes=file.max_message_bytes,
                gpu=file.gpu,
            ),
            clock,
        )
    raise EngineUnavailable(
        f"there is no engine {file.spec.backend!r}: the engines are llama, minilm and process:NAME.",
        engine=file.spec.backend,
    )
