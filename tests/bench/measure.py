"""What the benchmarks share: spread over rounds, and how a result is told."""

import json
import os
import platform
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

Result = Mapping[str, float | int | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One benchmark's results, baselines among them."""

    benchmark: str
    results: Sequence[Result]
    machine: Mapping[str, str | int] = field(
        default_factory=lambda: {"cores": os.cpu_count() or 0, "python": platform.python_version()}
    )

    def to_json(self) -> str:
        """Return one object on one line."""
        return json.dumps(asdict(self))

    def to_text(self) -> str:
        """Return a line for each result."""
        lines = [f"{self.benchmark}:"]
        for result in self.results:
            cells = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in result.items())
            lines.append("  " + "  ".join(cells))
        return "\n".join(lines)


async def latencies_us(call: Callable[[], Awaitable[object]], count: int) -> list[float]:
    """Call one after the other; return the microseconds that each took."""
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        taken.append((time.perf_counter() - began) * 1e6)
    return taken


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which that share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
