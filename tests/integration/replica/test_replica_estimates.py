"""What the estimate says before a load against what the replica measures after it. F29."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from localmesh.core.gguf import estimate, read_header


@pytest.mark.parametrize(
    ("shape", "spec_fields"),
    [
        ({"layers": 4, "width": 256, "heads": 8, "kv_heads": 8}, {"context_tokens": 4096, "slots": 4}),
        ({"layers": 4, "width": 256, "heads": 8, "kv_heads": 8}, {"context_tokens": 16384, "slots": 2}),
        (
            {"layers": 4, "width": 256, "heads": 8, "kv_heads": 8},
            {"context_tokens": 16384, "slots": 2, "cache_type": "q8_0"},
        ),
        ({"layers": 8, "width": 768, "heads": 12, "kv_heads": 4, "feed_forward": 3072}, {"context_tokens": 1024}),
        ({"layers": 4, "width": 256, "heads": 8, "kv_heads": 4}, {"context_tokens": 2048, "embeddings": True}),
    ],
)
async def test_the_estimate_is_near_what_the_loaded_model_takes(
    start_replica: Callable[..., Any],
    spec: Callable[..., Any],
    make_gguf: Callable[..., Path],
    tmp_path: Path,
    shape: dict[str, int],
    spec_fields: dict[str, Any],
) -> None:
    path = make_gguf(tmp_path / "m.gguf", context=32768, **shape)
    model = spec(**({"slots": 1} | spec_fields))
    replica = await asyncio.to_thread(lambda: start_replica(model, source_path=str(path)).ready())
    with path.open("rb") as stream:
        expected = estimate(
            read_header(stream),
            context_tokens=model.context_tokens,
            slots=model.slots,
            cache_type=model.cache_type,
            embeddings=model.embeddings,
        )
    measured = replica.events[-1].memory_bytes
    # other replicas of the test run may share libraries with it, so less is fine; the caches must be in it, though
    assert 0.5 * (expected.kv + expected.weights) < measured < 1.25 * expected.total + (24 << 20), (
        f"measured {measured >> 20} MiB, expected {expected}"
    )
