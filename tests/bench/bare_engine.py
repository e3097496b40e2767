"""llama.cpp alone, in a process of its own: python -m tests.bench.bare_engine MODEL SLOTS CALLERS TOKENS ROUNDS.

Prints a line of JSON for each round, and first one when the model has loaded and answered for the first time.
"""

import json
import sys
import threading
import time
from typing import Any

import xllamacpp

_PROMPT = "The import statement"


def main(model: str, slots: int, callers: int, tokens: int, rounds: int) -> None:
    """Load, answer, measure."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = slots
    params.n_ctx = 512 * slots
    params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    _generate(server, 4)
    print(json.dumps({"first_answer": True}), flush=True)
    for _ in range(rounds):
        made = [0] * callers

        def work(place: int, made: list[int] = made) -> None:
            made[place] = _generate(server, tokens)

        threads = [threading.Thread(target=work, args=(place,)) for place in range(callers)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(json.dumps({"tokens_per_second": sum(made) / (time.perf_counter() - began)}), flush=True)


def _generate(server: Any, tokens: int) -> int:
    made = 0

    def on_chunk(chunk: Any) -> bool:
        nonlocal made
        if isinstance(chunk, dict) and (usage := chunk.get("usage")):
            made = usage["completion_tokens"]
        return False

    body = {"prompt": _PROMPT, "max_tokens": tokens, "temperature": 0.8, "seed": 1, "ignore_eos": True, "stream": True}
    server.handle_completions({**body, "stream_options": {"include_usage": True}}, on_chunk)
    return made


if __name__ == "__main__":
    main(sys.argv[1], *(int(a) for a in sys.argv[2:6]))
