"""The engine for any backend that speaks LocalAI's backend.Backend, started unchanged as a process of its own."""

import asyncio
import os
import secrets
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from localmesh.core.clock import Clock
from localmesh.core.errors import (
    CapabilityUnsupported,
    EngineFailed,
    EngineUnavailable,
    InvalidRequest,
    LoadFailed,
    MeshError,
    ReplicaLost,
)
from localmesh.core.records import ModelSpec
from localmesh.replica.engines.backend_child import BackendChild
from localmesh.replica.engines.backend_messages import ReplyReader, model_options, predict_options
from localmesh.replica.engines.base import (
    Capability,
    ChatCall,
    Embeddings,
    EngineMetrics,
    GenerateCall,
    Loaded,
    Piece,
    Ranking,
    ReportPhase,
    Score,
    TokenLogprob,
)
from localmesh.replica.engines.slots import Slots
from localmesh.replica.race import first_of
from localmesh.rpc.proxy import connection_lost
from localmesh.thirdparty import backend_pb2 as pb
from localmesh.thirdparty import backend_pb2_grpc

PREFIX = "process:"

_SECONDS = {"start_seconds": 120.0, "load_seconds": 600.0, "stop_seconds": 3.0, "hang_seconds": 300.0}
"""Options of ours, and what they are unless the spec says otherwise."""
_LOOK_SECONDS = 0.05
_HEALTH_SECONDS = 2.0
_FREE_SECONDS = 2.0
_LAST_WORDS_SECONDS = 1.0
"""How long a backend whose connection broke may take to end, so that its last words can be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessConfig:
    """How a backend is started and what it loads."""

    spec: ModelSpec
    backend_dir: Path
    source_path: str
    max_message_bytes: int
    gpu: bool = False


class ProcessEngine:
    """A foreign backend with one model. See Engine.

    Its typed calls are mapped to that protocol's; `channel` is for whoever forwards raw ones, inside `slots.taken()`.
    """

    def __init__(self, config: ProcessConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._spec = config.spec
        self._token = secrets.token_hex(16)
        self._hung = asyncio.Event()
        self._child: BackendChild | None = None
        self._channel: Any = None
        self._stub: Any = None
        self._loaded = Loaded(capabilities=frozenset())
        self._seconds = _read_seconds(self._spec)
        self.slots = Slots(
            max(1, self._spec.slots),
            probe=lambda limit: self._stub.Health(pb.HealthMessage(), timeout=limit, metadata=self.metadata),
            hang_seconds=self._seconds["hang_seconds"],
            hung=self._hung,
            clock=clock,
        )

    @property
    def name(self) -> str:
        """See Engine."""
        return self._spec.backend

    @property
    def loaded(self) -> Loaded:
        """See Engine."""
        return self._loaded

    @property
    def channel(self) -> Any:
        """Channel to the backend, once loaded."""
        return self._channel

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call to the backend carries: other users of the machine may not call it."""
        return (("authorization", f"Bearer {self._token}"),)

    async def load(self, report: ReportPhase) -> None:
        """See Engine."""
        folder = self._config.backend_dir
        script = folder / "run.sh"
        if not os.access(script, os.X_OK):
            raise EngineUnavailable(
                f"there is no executable {script}: install the backend {self.name.removeprefix(PREFIX)!r} there.",
                engine=self.name,
            )
        options = model_options(
            self._spec, self._config.source_path, gpu=self._config.gpu, ours=frozenset(self._seconds)
        )
        self._child = await BackendChild.start(
            [str(script), "--addr", "127.0.0.1:0"], folder=folder, environment=self._environment()
        )
        await self._or_dies(self._find(), "start_seconds", "answer Health")
        report("loading", 0, 0)
        await self._or_dies(self._load_model(options), "load_seconds", "load the model")
        self._loaded = Loaded(capabilities=frozenset(Capability), context_tokens=self._spec.context_tokens)

    async def lost(self) -> str:
        """See Engine."""
        child = self._started()
        if await first_of(child.wait(), self._hung.wait()) == 0:
            return await child.wait()
        return f"it has not answered Health for {self._seconds['hang_seconds']:g} s after its caller had left"

    async def stop(self) -> None:
        """See Engine."""
        child, self._child = self._child, None
        if child is None:
            return
        if self._loaded.capabilities and child.running:
            with suppress(grpc.aio.AioRpcError):  # few backends have it, and the process ends anyway
                await self._stub.Free(pb.HealthMessage(), timeout=_FREE_SECONDS, metadata=self.metadata)
        await child.stop(self._seconds["stop_seconds"])
        if self._channel is not None:
            await self._channel.close()

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Piece, None]:
        """See Engine."""
        async with aclosing(self._predict(call, Capability.GENERATE)) as pieces:
            async for piece in pieces:
                yield piece

    async def chat(self, call: ChatCall) -> AsyncGenerator[Piece, None]:
        """See Engine."""
        async with aclosing(self._predict(call, Capability.CHAT)) as pieces:
            async for piece in pieces:
                yield piece

    async def embed(self, inputs: tuple[str | tuple[int, ...], ...]) -> Embeddings:
        """See Engine. That protocol takes one input a call."""
        vectors, tokens = [], 0
        for given in inputs:
            options = pb.PredictOptions(ModelIdentity=self._spec.name)
            if isinstance(given, str):
                options.Embeddings = options.Prompt = given
            else:
                options.EmbeddingTokens.extend(given)
            result = await self._call(self._stub.Embedding, options, Capability.EMBED)
            vectors.append(tuple(result.embeddings))
            tokens += result.prompt_tokens
        return Embeddings(vectors=tuple(vectors), prompt_tokens=tokens)

    async def tokenize(self, text: str, *, add_special: bool) -> tuple[int, ...]:  # noqa: ARG002 - cannot be said
        """See Engine. That protocol cannot say whether special tokens are wanted."""
        options = pb.PredictOptions(Prompt=text, ModelIdentity=self._spec.name)
        return tuple((await self._call(self._stub.TokenizeString, options, Capability.TOKENIZE)).tokens)

    async def detokenize(self, tokens: tuple[int, ...]) -> str:
        """See Engine."""
        request = pb.DetokenizeRequest(tokens=tokens)
        return str((await self._call(self._stub.Detokenize, request, Capability.DETOKENIZE)).content)

    async def rerank(self, query: str, documents: tuple[str, ...], top_n: int) -> Ranking:
        """See Engine."""
        request = pb.RerankRequest(
            query=query, documents=documents, top_n=top_n or len(documents), ModelIdentity=self._spec.name
        )
        result = await self._call(self._stub.Rerank, request, Capability.RERANK)
        ranked = sorted(((r.index, r.relevance_score) for r in result.results), key=lambda r: -r[1])
        return Ranking(results=tuple(ranked[: top_n or None]), prompt_tokens=result.usage.prompt_tokens)

    async def score(self, prompt: str, candidates: tuple[str, ...]) -> tuple[Score, ...]:
        """See Engine."""
        request = pb.ScoreRequest(
            prompt=prompt, candidates=candidates, include_token_logprobs=True, ModelIdentity=self._spec.name
        )
        result = await self._call(self._stub.Score, request, Capability.SCORE)
        return tuple(_score(candidate) for candidate in result.candidates)

    async def metrics(self) -> EngineMetrics:
        """See Engine."""
        result = await self._call(self._stub.GetMetrics, pb.MetricsRequest(), None)
        return EngineMetrics(
            prompt_tokens=result.prompt_tokens_processed,
            completion_tokens=result.tokens_generated,
            tokens_per_second=result.tokens_per_second,
        )

    async def _predict(self, call: GenerateCall | ChatCall, capability: Capability) -> AsyncGenerator[Piece, None]:
        options = predict_options(call, self._spec.name)
        reader = ReplyReader(call.sampling.max_tokens)
        try:
            async with self.slots.taken():
                if call.streamed:
                    replies = self._stub.PredictStream(options, metadata=self.metadata)
                    try:
                        async for reply in replies:
                            if piece := reader.piece(reply):
                                yield piece
                    finally:
                        replies.cancel()
                elif piece := reader.piece(await self._stub.Predict(options, metadata=self.metadata)):
                    yield piece
        except grpc.aio.AioRpcError as error:
            raise await self._meaning(error, capability) from error
        yield reader.end()

    async def _call(self, method: Any, request: Any, capability: Capability | None) -> Any:
        try:
            async with self.slots.taken():
                return await method(request, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            raise await self._meaning(error, capability) from error

    async def _meaning(self, error: grpc.aio.AioRpcError, capability: Capability | None) -> MeshError:
        """Return what a backend's error means to a caller."""
        code, text = error.code(), error.details() or ""
        if code is grpc.StatusCode.UNIMPLEMENTED:
            what = capability.value if capability else "do this"
            return CapabilityUnsupported(
                f"the backend {self.name!r} cannot {what}.", model=self._spec.name, capability=what
            )
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequest(f"the backend {self.name!r} does not accept the request: {text}", field="")
        if connection_lost(code, text, error.trailing_metadata() or ()):
            return ReplicaLost(
                f"the backend {self.name!r} died while it answered: {await self._obituary(text)}", replica=""
            )
        return EngineFailed(f"the backend {self.name!r} failed at this request: {code.name}: {text}", engine=self.name)

    async def _obituary(self, otherwise: str) -> str:
        if self._child is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_SECONDS):
                    return await self._child.wait()
        return otherwise

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,  # noqa: TID251 - a foreign program gets the environment as it is
            "LOCALAI_GRPC_AUTH_TOKEN": self._token,
            "PYTHON_GRPC_MAX_WORKERS": str(max(1, self._spec.slots)),
            "OMP_NUM_THREADS": str(max(1, self._spec.threads)),
        }

    async def _or_dies(self, step: Coroutine[Any, Any, None], limit: str, what: str) -> None:
        """Take a step of the start, unless the backend dies or takes too long."""
        child = self._started()
        try:
            async with asyncio.timeout(self._seconds[limit]):
                if await first_of(step, child.wait()) == 0:
                    return
        except TimeoutError:
            raise LoadFailed(
                f"the backend {self.name!r} did not {what} within {self._seconds[limit]:g} s ({limit})"
                f"{child.last_words()}",
                model=self._spec.name,
            ) from None
        raise LoadFailed(f"the backend {self.name!r} did not {what}: {await child.wait()}", model=self._spec.name)

    async def _find(self) -> None:
        """Find the port of ours that answers Health, and keep a channel to it."""
        child = self._started()
        while True:
            for port in await asyncio.to_thread(child.listening_ports):
                channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=self._channel_options())
                stub = backend_pb2_grpc.BackendStub(channel)
                try:
                    reply = await stub.Health(pb.HealthMessage(), timeout=_HEALTH_SECONDS, metadata=self.metadata)
                except grpc.aio.AioRpcError:
                    await channel.close()  # not up yet, or another server of that process
                    continue
                if reply.message == b"OK":
                    self._channel, self._stub = channel, stub
                    return
                await channel.close()
            await asyncio.sleep(_LOOK_SECONDS)

    def _channel_options(self) -> list[tuple[str, int]]:
        limit = self._config.max_message_bytes
        return [
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            ("grpc.enable_http_proxy", 0),
        ]

    async def _load_model(self, options: pb.ModelOptions) -> None:
        try:
            result = await self._stub.LoadModel(options, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            if connection_lost(error.code(), error.details() or "", error.trailing_metadata() or ()):
                await self._obituary("")  # it is dying: let that be the news
            raise LoadFailed(
                f"the backend {self.name!r} did not load the model: {error.code().name}: {error.details()}",
                model=self._spec.name,
            ) from error
        if not result.success:
            raise LoadFailed(
                f"the backend {self.name!r} did not load the model: {result.message or 'it gave no reason'}",
                model=self._spec.name,
            )

    def _started(self) -> BackendChild:
        if self._child is None:
            raise EngineFailed(f"the backend {self.name!r} is not running.", engine=self.name)
        return self._child


def _read_seconds(spec: ModelSpec) -> dict[str, float]:
    seconds = dict(_SECONDS)
    for name in seconds:
        value = spec.options.get(name, str(seconds[name]))
        try:
            seconds[name] = float(value)
        except ValueError:
            raise LoadFailed(f"option {name}: {value!r} is not a number.", model=spec.name) from None
    return seconds


def _score(candidate: Any) -> Score:
    """Return a candidate's score; a backend that names no tokens has them counted only."""
    tokens = tuple(TokenLogprob(token=t.token, logprob=t.log_prob) for t in candidate.tokens)
    if not tokens and candidate.num_tokens:
        share = candidate.log_prob / candidate.num_tokens
        tokens = tuple(TokenLogprob(token="", logprob=share) for _ in range(candidate.num_tokens))
    return Score(tokens=tokens)
