"""The engine for folders of sentence-embedding weights: converted to a GGUF once, then served by llama.cpp."""

import asyncio
import json
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localmesh.core.errors import EngineUnavailable, LoadFailed, MeshError, SourceMissing
from localmesh.core.records import ModelSpec
from localmesh.replica.engines.base import ReportPhase
from localmesh.replica.engines.gguf_convert import PRECISIONS, ConvertError, cached_path
from localmesh.replica.engines.llama import LlamaConfig, LlamaEngine

ENGINE = "minilm"

_PRECISION = "precision"


@dataclass(frozen=True, slots=True, kw_only=True)
class MinilmConfig:
    """How a model is loaded."""

    spec: ModelSpec
    folder: Path
    """With config.json, tokenizer.json and model.safetensors."""
    cache_dir: Path
    """Shared by all replicas of the node."""
    run_dir: Path
    limit: int
    gpu: bool = False


class MinilmEngine(LlamaEngine):
    """llama.cpp with a converted sentence-embedding model. See Engine."""

    def __init__(self, config: MinilmConfig) -> None:
        options = dict(config.spec.options)
        self._minilm = config
        self._precision = options.pop(_PRECISION, PRECISIONS[0])
        self._converter: Process | None = None
        super().__init__(
            LlamaConfig(
                spec=replace(config.spec, embeddings=True, options=options),
                model_path=Path(),
                run_dir=config.run_dir,
                limit=config.limit,
                gpu=config.gpu,
                engine=ENGINE,
            )
        )

    async def load(self, report: ReportPhase) -> None:
        """See Engine."""
        spec, folder = self._minilm.spec, self._minilm.folder
        if self._precision not in PRECISIONS:
            raise LoadFailed(
                f"option {_PRECISION}: {self._precision!r} is none of {', '.join(PRECISIONS)}.", model=spec.name
            )
        try:
            path = cached_path(folder, self._minilm.cache_dir, self._precision)
        except ConvertError as error:
            raise self._mesh_error(error.reason, str(error)) from error
        if not path.exists():
            await self._convert(folder, path, report)
        self.use_model(path)
        await super().load(report)

    async def stop(self) -> None:
        """See Engine."""
        if self._converter is not None and self._converter.returncode is None:
            with suppress(ProcessLookupError):
                self._converter.send_signal(signal.SIGKILL)
            await self._converter.wait()
        await super().stop()

    async def _convert(self, folder: Path, out: Path, report: ReportPhase) -> None:
        report("converting", 0, (folder / "model.safetensors").stat().st_size)
        self._converter = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "localmesh.replica.engines.gguf_convert"),
            *(str(folder), str(out), self._precision),
            stdin=DEVNULL,
            stdout=PIPE,
        )
        last: dict[str, Any] = {}
        assert self._converter.stdout is not None  # noqa: S101 - it was asked for
        async for line in self._converter.stdout:
            with suppress(ValueError):
                last = json.loads(line)
            if "done" in last:
                report("converting", last["done"], last["total"])
        code = await self._converter.wait()
        if "error" in last:
            raise self._mesh_error(last["error"], last["message"])
        if code != 0:
            raise self._mesh_error("LOAD_FAILED", f"converting {folder} failed with exit code {code}; see the log.")

    def _mesh_error(self, reason: str, message: str) -> MeshError:
        spec = self._minilm.spec
        if reason == SourceMissing.reason:
            return SourceMissing(message, model=spec.name, source=spec.source)
        if reason == EngineUnavailable.reason:
            return EngineUnavailable(message, model=spec.name, engine=ENGINE)
        return LoadFailed(message, model=spec.name)
