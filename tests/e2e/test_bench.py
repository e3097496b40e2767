"""The benchmarks at reduced size: they run, and no ratio is absurd. The numbers are in tests/bench/README.md."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp")

ROOT = Path(__file__).resolve().parents[2]


def bench(name: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", name, "--quick", "--json"],
        cwd=ROOT,
        env=dict(os.environ),  # noqa: TID251 - a test starts processes with its own environment
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["benchmark"] == name
    assert report["machine"]["cores"] >= 1
    return report


def only(report: dict[str, Any], key: str) -> list[float]:
    return [result[key] for result in report["results"] if key in result]


@pytest.mark.timeout(300)
def test_the_router_s_hop_costs_a_few_calls_not_many() -> None:
    report = bench("hop")
    (latency,) = only(report, "p50_ratio")
    rates = only(report, "rate_ratio")
    assert 1 < latency < 50
    assert len(rates) == 3
    assert all(0.02 < rate < 20 for rate in rates)


@pytest.mark.timeout(300)
def test_a_replica_gives_most_of_its_engine() -> None:
    rates = only(bench("engine"), "rate_ratio")
    assert len(rates) == 2
    assert all(0.02 < rate < 20 for rate in rates)


@pytest.mark.timeout(300)
def test_a_mesh_answers_soon_after_its_start() -> None:
    report = bench("cold")
    (ratio,) = only(report, "time_ratio")
    assert 1 < ratio < 100


@pytest.mark.timeout(300)
def test_the_estimate_is_near_what_a_replica_takes() -> None:
    """F29."""
    errors = only(bench("estimate"), "error")
    assert len(errors) == 2
    assert all(-0.3 < error < 0.5 for error in errors)
