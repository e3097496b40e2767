"""Which engines this node can run, and on what kinds of device."""

import asyncio
import importlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from localmesh.core.records import EngineInfo

_log = logging.getLogger(__name__)
_PROBE_SECONDS = 20.0
_PROCESS = "process:"
_PROBE = """
import json, xllamacpp
print("\\n" + json.dumps([str(getattr(d["type"], "name", d["type"])) for d in xllamacpp.get_device_info()]))
"""
_MINILM_NEEDS = ("xllamacpp", "gguf", "safetensors", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaAbility:
    """What the installed xllamacpp can do."""

    version: str
    """Empty when it is not installed."""
    gpu: bool = False
    problem: str = ""
    """Why it does not work here, though it is installed."""


async def probe(*backends_dirs: Path, gpus: bool, environment: Mapping[str, str]) -> tuple[EngineInfo, ...]:
    """Return all engines that this node knows of, those that it cannot run included.

    Args:
        backends_dirs: Folders of the foreign backends; a name in an earlier one wins.
        gpus: Whether the node has a GPU.
        environment: Environment of the probe, which starts a short child process.
    """
    importlib.invalidate_caches()
    llama = await llama_ability(environment)
    return (
        llama_engine(llama, gpus=gpus),
        minilm_engine(llama, missing=[p for p in _MINILM_NEEDS if not _version(p)]),
        *process_engines(*backends_dirs, gpus=gpus),
    )


def with_process_engines(engines: Iterable[EngineInfo], found: Iterable[EngineInfo]) -> tuple[EngineInfo, ...]:
    """Return the engines with the foreign ones replaced by those that were found."""
    return (*(engine for engine in engines if not engine.name.startswith(_PROCESS)), *found)


async def llama_ability(environment: Mapping[str, str]) -> LlamaAbility:
    """Ask the installed xllamacpp what it computes on, in a child process: asking initialises the GPU's runtime."""
    version = _version("xllamacpp")
    if not version:
        return LlamaAbility(version="")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _PROBE,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(environment),
    )
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            output, errors = await process.communicate()
    except TimeoutError:
        return LlamaAbility(version=version, problem=f"does not answer within {_PROBE_SECONDS:.0f} s")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return read_probe(version, process.returncode or 0, output, errors)


def read_probe(version: str, returncode: int, output: bytes, errors: bytes) -> LlamaAbility:
    """Return what the probe's output says."""
    try:
        kinds = json.loads(output.splitlines()[-1]) if returncode == 0 else None
    except (ValueError, IndexError):
        kinds = None
    if not isinstance(kinds, list):
        last = errors.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"exit code {returncode}"]
        return LlamaAbility(version=version, problem=f"does not start here: {last[0][:300]}")
    # ..._TYPE_GPU and ..._TYPE_IGPU compute; ..._TYPE_ACCEL helps the CPU
    return LlamaAbility(version=version, gpu=any(str(kind).endswith("GPU") for kind in kinds))


def llama_engine(llama: LlamaAbility, *, gpus: bool) -> EngineInfo:
    """Return the engine "llama"."""
    if not llama.version:
        return EngineInfo(
            name="llama", available=False, device_kinds=(), detail="install it: pip install 'localmesh[engines]'"
        )
    name = f"xllamacpp {llama.version}"
    if llama.problem:
        return EngineInfo(name="llama", available=False, device_kinds=(), detail=f"{name} {llama.problem}")
    if llama.gpu:
        return EngineInfo(name="llama", available=True, device_kinds=("cpu", "gpu"), detail=name)
    if gpus:
        name += (
            ", a build for the CPU only: for this node's GPU install xllamacpp from its own wheel index, kind cu132"
            " (driver for CUDA 13.2 or newer) or cu128"
        )
    return EngineInfo(name="llama", available=True, device_kinds=("cpu",), detail=name)


def minilm_engine(llama: LlamaAbility, *, missing: list[str]) -> EngineInfo:
    """Return the engine "minilm", which computes small sentences: the CPU is what it uses."""
    if missing:
        return EngineInfo(
            name="minilm",
            available=False,
            device_kinds=(),
            detail=f"lacks {', '.join(missing)}: pip install 'localmesh[engines]'",
        )
    if llama.problem:
        return EngineInfo(
            name="minilm", available=False, device_kinds=(), detail=f"xllamacpp {llama.version} {llama.problem}"
        )
    return EngineInfo(name="minilm", available=True, device_kinds=("cpu",), detail=f"xllamacpp {llama.version}")


def process_engines(*backends_dirs: Path, gpus: bool) -> tuple[EngineInfo, ...]:
    """Return an engine "process:NAME" for each folder NAME with an executable run.sh.

    What such a backend computes on is its own affair: on a node with a GPU both kinds are offered, and a model's
    device kind decides.

    Args:
        backends_dirs: Folders of such folders; a name in an earlier one wins.
        gpus: Whether the node has a GPU.
    """
    found: dict[str, EngineInfo] = {}
    for folder in (p for backends_dir in backends_dirs for p in _folders(backends_dir)):
        script = folder / "run.sh"
        if folder.name not in found and _is_file(script):
            runs = os.access(script, os.X_OK)
            found[folder.name] = EngineInfo(
                name=f"{_PROCESS}{folder.name}",
                available=runs,
                device_kinds=("cpu", "gpu") if gpus else ("cpu",),
                detail=str(folder) if runs else f"{script} is not executable: chmod +x it",
            )
    return tuple(found[name] for name in sorted(found))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder that this user may not look into
        return False


def _folders(backends_dir: Path) -> list[Path]:
    try:
        return sorted(p for p in backends_dir.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
