"""The estimate before a load against the memory of the replica's process after it has computed a full batch.

Beside ours stands the formula of LocalAI (pkg/vram at the version that localmesh was compared with), which counts no
layers in the context's keys and values.
"""

import asyncio
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import grpc

from localmesh.core.gguf import Header, estimate, read_header
from localmesh.core.ids import CPU, ModelName, NodeName, ReplicaId
from localmesh.core.records import ModelSpec
from localmesh.core.replica_process import FailedEvent, ReadyEvent, ReplicaSpecFile, parse_status
from localmesh.replica.memory import group_memory_bytes
from localmesh.testing import MODELS_FOLDER
from localmesh.v1 import inference_service_pb2 as pb
from localmesh.v1 import inference_service_pb2_grpc
from tests.bench.engine import ROOT
from tests.bench.measure import Report
from tests.models.random_gguf import make_random_gguf

_MIB = 1 << 20
_WORD, _SAMPLE, _BATCH = "import ", 16, 512
"""What prompts are made of, how many of it tell its length, and tokens of a batch."""
_Q4 = gguf.GGMLQuantizationType.Q4_0
_Q8 = gguf.GGMLQuantizationType.Q8_0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model's shape, and how it is loaded."""

    name: str
    shape: Mapping[str, Any] = field(default_factory=dict)
    """For make_random_gguf; empty is the small real model."""
    context_tokens: int = 2048
    slots: int = 1
    cache_type: str = ""

    @property
    def spec(self) -> ModelSpec:
        """The model as it is declared."""
        return ModelSpec(
            name=ModelName("m"),
            backend="llama",
            source="m.gguf",
            context_tokens=self.context_tokens,
            slots=self.slots,
            cache_type=self.cache_type,
            threads=2,
        )


_DEEP = {"layers": 16, "width": 256, "heads": 8, "kv_heads": 8, "feed_forward": 512}
_WIDE = {"layers": 8, "width": 1024, "heads": 16, "kv_heads": 4, "feed_forward": 4096}
CASES = (
    Case(name="tiny.gguf"),
    Case(name="tiny.gguf", slots=4),
    Case(name="deep f16", shape=_DEEP, slots=4),
    Case(name="deep f16", shape=_DEEP, slots=4, cache_type="q8_0"),
    Case(name="deep f16", shape=_DEEP, context_tokens=8192),
    Case(name="wide f16", shape=_WIDE),
    Case(name="wide q8_0", shape={**_WIDE, "quantization": _Q8}, slots=2),
    Case(name="wide q4_0", shape={**_WIDE, "quantization": _Q4}, slots=2),
)
QUICK = (CASES[1], CASES[2])


async def run(*, quick: bool, environment: dict[str, str]) -> Report:
    """Measure each case in a process of its own, one after the other."""
    results: list[dict[str, float | int | str]] = []
    for case in QUICK if quick else CASES:
        with tempfile.TemporaryDirectory(prefix="lm-bench-") as folder:
            results.append(await _measure(case, Path(folder)))
    errors = [abs(float(row["error"])) for row in results]
    theirs = [abs(float(row["localai_error"])) for row in results]
    results.append(
        {
            "what": "largest error",
            "ours": max(errors),
            "localai": max(theirs),
            "mean_ours": sum(errors) / len(errors),
            "mean_localai": sum(theirs) / len(theirs),
        }
    )
    return Report(benchmark="estimate", results=results)


async def _measure(case: Case, folder: Path) -> dict[str, float | int | str]:
    path = MODELS_FOLDER / "tiny.gguf"
    if case.shape:
        path = await asyncio.to_thread(
            lambda: make_random_gguf(folder / "m.gguf", context=case.context_tokens, **case.shape)
        )
    with path.open("rb") as stream:
        header = read_header(stream)
    expected = estimate(header, context_tokens=case.context_tokens, slots=case.slots, cache_type=case.cache_type).total
    async with _replica(case.spec, path, folder) as (pid, endpoint):
        await _fill(endpoint, case)
        measured = group_memory_bytes(pid)
    localai = _localai(header, case)
    return {
        "what": case.name,
        "context": case.context_tokens,
        "slots": case.slots,
        "cache": case.cache_type or "f16",
        "estimate_mib": expected / _MIB,
        "measured_mib": measured / _MIB,
        "error": expected / measured - 1,
        "localai_mib": localai / _MIB,
        "localai_error": localai / measured - 1,
    }


@asynccontextmanager
async def _replica(spec: ModelSpec, path: Path, folder: Path) -> Any:
    """Start a replica as a worker would; yield its process and its address."""
    file = ReplicaSpecFile(
        mesh="bench",
        replica=ReplicaId(spec.name, NodeName("n"), 0),
        revision="r",
        spec=spec,
        source_path=str(path),
        devices={CPU: 1 << 30},
        run_dir=str(folder),
        cache_dir=str(folder / "cache"),
        parent_pid=os.getpid(),
    )
    (folder / "spec.json").write_text(file.to_json())
    reading, writing = os.pipe()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "localmesh.replica",
        *("--spec", str(folder / "spec.json"), "--status-fd", str(writing)),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        pass_fds=(writing,),
        start_new_session=True,
    )
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as lines:
            yield process.pid, await asyncio.to_thread(_ready, lines)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def _ready(lines: Any) -> str:
    for line in lines:
        match parse_status(line):
            case ReadyEvent(endpoint=endpoint):
                return str(endpoint)
            case FailedEvent(message=message):
                raise RuntimeError(message)
    raise RuntimeError("the replica ended before it was ready")


async def _fill(endpoint: str, case: Case) -> None:
    """Have every slot compute a prompt of a batch: the context's memory is written to at the start, the rest here."""
    async with grpc.aio.insecure_channel(endpoint) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        sample = await stub.Tokenize(pb.TokenizeRequest(text=_WORD * _SAMPLE), timeout=60)
        prompt = _WORD * (_BATCH * _SAMPLE // len(sample.tokens))
        request = pb.GenerateRequest(prompt=prompt, sampling=pb.SamplingOptions(max_tokens=4, temperature=0))
        await asyncio.gather(*(stub.Generate(request, timeout=300) for _ in range(case.slots)))


def _localai(header: Header, case: Case) -> float:
    """Return LocalAI's estimate: weights, keys and values without the number of layers, and a fixed part."""
    metadata = {key.rpartition(".")[2]: value for key, value in header.metadata.items()}
    width, kv_heads = metadata["embedding_length"], metadata["head_count_kv"]
    bytes_kv = 1 if case.cache_type == "q8_0" else 2
    assert isinstance(width, int)
    assert isinstance(kv_heads, int)
    weights = header.weights_bytes
    return weights + bytes_kv * width * kv_heads * case.context_tokens * case.slots + 0.02 * 2 * weights + 0.15e9
