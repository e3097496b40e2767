"""From nothing to the first answer: a whole mesh, against the bare engine in one process."""

import asyncio
import sys
import time

from localmesh.testing import MODELS_FOLDER, LocalMesh, for_model, tiny_spec
from localmesh.v1 import inference_service_pb2 as pb
from tests.bench.engine import ROOT
from tests.bench.measure import Report, median


async def run(*, quick: bool, environment: dict[str, str]) -> Report:
    """Measure both several times, in turns."""
    up: list[float] = []
    answered: list[float] = []
    bare: list[float] = []
    for _ in range(2 if quick else 5):
        bare.append(await _bare())
        ready, first = await _mesh(environment)
        up.append(ready)
        answered.append(first)
    return Report(
        benchmark="cold",
        results=[
            {"what": "bare engine, start to first answer", "p50_ms": median(bare)},
            {"what": "mesh, start to ready", "p50_ms": median(up)},
            {"what": "mesh, start to first answer", "p50_ms": median(answered)},
            {"what": "mesh against bare engine, first answer", "time_ratio": median(answered) / median(bare)},
        ],
    )


async def _mesh(environment: dict[str, str]) -> tuple[float, float]:
    began = time.perf_counter()
    async with LocalMesh(nodes=("alpha",), environment=environment) as mesh:
        ready = (time.perf_counter() - began) * 1e3
        await mesh.apply(tiny_spec())
        request = pb.GenerateRequest(prompt="The", sampling=pb.SamplingOptions(max_tokens=4))
        await mesh.inference.Generate(request, metadata=for_model("tiny"), timeout=90)
        return ready, (time.perf_counter() - began) * 1e3


async def _bare() -> float:
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.bench.bare_engine",
        *(str(MODELS_FOLDER / "tiny.gguf"), "4", "1", "1", "0"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    async for line in process.stdout:
        if line.startswith(b"{"):
            break
    taken = (time.perf_counter() - began) * 1e3
    await process.communicate()
    return taken
