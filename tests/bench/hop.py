"""What the router's hop costs: the same calls to the same replica, directly and through the router, in turns."""

import asyncio
import time
from typing import Any

from localmesh.testing import LocalMesh, for_model, tiny_spec
from localmesh.v1 import inference_service_pb2 as pb
from localmesh.v1 import inference_service_pb2_grpc
from tests.bench.measure import Report, latencies_us, median, percentile

_CALLERS = 16
_ROUNDS = 5


async def run(*, quick: bool, environment: dict[str, str]) -> Report:
    """Measure latency, rate and streamed messages."""
    async with LocalMesh(nodes=("alpha",), environment=environment) as mesh:
        spec = tiny_spec(slots=4, context_tokens=512)
        spec.parameters.max_concurrent_requests = 64
        await mesh.apply(spec, min_replicas=1)
        (replica,) = await mesh.routable("tiny")
        ways: dict[str, Any] = {
            "direct": inference_service_pb2_grpc.InferenceServiceStub(mesh.channel(replica.endpoint)),
            "router": mesh.inference,
        }
        scale = 1 if quick else 5
        unary = await _unary(ways, 60 * scale)
        rate = await _rate(ways, 240 * scale)
        streams = [await _streamed(ways, callers, 32 * scale) for callers in (1, 4)]
    return Report(benchmark="hop", results=[*unary, *rate, *(row for rows in streams for row in rows)])


async def _tokenize(stub: Any) -> None:
    await stub.Tokenize(pb.TokenizeRequest(text="The quick brown fox"), metadata=for_model("tiny"), timeout=30)


async def _unary(ways: dict[str, Any], count: int) -> list[dict[str, float | str]]:
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(_ROUNDS):
        for way, stub in ways.items():
            taken[way] += await latencies_us(lambda stub=stub: _tokenize(stub), count)
    rows: list[dict[str, float | str]] = [
        {"what": "unary", "way": way, "p50_us": median(t), "p99_us": percentile(t, 0.99)} for way, t in taken.items()
    ]
    return [*rows, {"what": "unary", "p50_ratio": median(taken["router"]) / median(taken["direct"])}]


async def _rate(ways: dict[str, Any], count: int) -> list[dict[str, float | str]]:
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(_ROUNDS):
        for way, stub in ways.items():
            began = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for _caller in range(_CALLERS):
                    group.create_task(_repeat(stub, count // _CALLERS))
            rates[way].append(count // _CALLERS * _CALLERS / (time.perf_counter() - began))
    rows: list[dict[str, float | str]] = [
        {"what": f"unary at {_CALLERS}", "way": way, "calls_per_second": median(r)} for way, r in rates.items()
    ]
    ratio = median(rates["router"]) / median(rates["direct"])
    return [*rows, {"what": f"unary at {_CALLERS}", "rate_ratio": ratio}]


async def _repeat(stub: Any, count: int) -> None:
    for _ in range(count):
        await _tokenize(stub)


async def _streamed(ways: dict[str, Any], callers: int, tokens: int) -> list[dict[str, float | str]]:
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(_ROUNDS):
        for way, stub in ways.items():
            began = time.perf_counter()
            counts = await asyncio.gather(*(_messages(stub, tokens) for _ in range(callers)))
            rates[way].append(sum(counts) / (time.perf_counter() - began))
    what = f"streamed, {callers} at once"
    rows: list[dict[str, float | str]] = [
        {"what": what, "way": way, "messages_per_second": median(r)} for way, r in rates.items()
    ]
    return [*rows, {"what": what, "rate_ratio": median(rates["router"]) / median(rates["direct"])}]


async def _messages(stub: Any, tokens: int) -> int:
    sampling = pb.SamplingOptions(max_tokens=tokens, temperature=0.8, seed=1)
    request = pb.StreamGenerateRequest(prompt="The import statement", sampling=sampling)
    count = 0
    async for _ in stub.StreamGenerate(request, metadata=for_model("tiny"), timeout=120):
        count += 1
    return count
