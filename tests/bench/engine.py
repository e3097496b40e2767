"""What a replica adds to its engine: the same model and prompt in llama.cpp alone, and streamed by a replica."""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from localmesh.testing import MODELS_FOLDER, LocalMesh, tiny_spec
from localmesh.v1 import inference_service_pb2 as pb
from localmesh.v1 import inference_service_pb2_grpc
from tests.bench.measure import Report, median

ROOT = Path(__file__).resolve().parents[2]
_SLOTS = 4


async def run(*, quick: bool, environment: dict[str, str]) -> Report:
    """Measure tokens per second at one caller and at four."""
    rounds = 3 if quick else 7
    tokens = 100 if quick else 400
    results: list[dict[str, float | str]] = []
    async with LocalMesh(nodes=("alpha",), environment=environment) as mesh:
        await mesh.apply(tiny_spec(slots=_SLOTS, context_tokens=512), min_replicas=1)
        (replica,) = await mesh.routable("tiny")
        stub = inference_service_pb2_grpc.InferenceServiceStub(mesh.channel(replica.endpoint))
        for callers in (1, _SLOTS):
            before = await bare_rates(callers, tokens, rounds)
            ours = [await _rate(stub, callers, tokens) for _ in range(rounds)]
            bare = [*before, *await bare_rates(callers, tokens, rounds)]
            what = f"{callers} at once"
            results += [
                {"what": what, "way": "bare engine", "tokens_per_second": median(bare)},
                {"what": what, "way": "replica", "tokens_per_second": median(ours)},
                {"what": what, "rate_ratio": median(ours) / median(bare)},
            ]
    return Report(benchmark="engine", results=results)


async def bare_rates(callers: int, tokens: int, rounds: int) -> list[float]:
    """Return tokens per second of llama.cpp alone, one number a round."""
    arguments = [str(MODELS_FOLDER / "tiny.gguf"), str(_SLOTS), str(callers), str(tokens), str(rounds)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.bench.bare_engine",
        *arguments,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    out, _ = await process.communicate()
    rows = [json.loads(line) for line in out.splitlines() if line.startswith(b"{")]
    return [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]


async def _rate(stub: Any, callers: int, tokens: int) -> float:
    began = time.perf_counter()
    counts = await asyncio.gather(*(_generate(stub, tokens) for _ in range(callers)))
    return sum(counts) / (time.perf_counter() - began)


async def _generate(stub: Any, tokens: int) -> int:
    sampling = pb.SamplingOptions(max_tokens=tokens, temperature=0.8, seed=1)
    made = 0
    request = pb.StreamGenerateRequest(prompt="The import statement", sampling=sampling)
    async for piece in stub.StreamGenerate(request, timeout=120):
        made = piece.usage.completion_tokens or made
    return made
