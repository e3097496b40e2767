"""backend.Backend of one replica, on the same engine as InferenceService: for clients that speak that protocol."""

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from localmesh.core.errors import CapabilityUnsupported, InvalidRequest, ModelNotFound
from localmesh.core.records import ModelSpec
from localmesh.replica import backend_requests as requests
from localmesh.replica.admission import Admission
from localmesh.replica.engines.base import Capability, ChatCall, Engine, GenerateCall, Piece, require
from localmesh.replica.inference import collect
from localmesh.thirdparty import backend_pb2 as pb
from localmesh.thirdparty import backend_pb2_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["Backend"].full_name


def already_loaded(spec: ModelSpec, request: pb.ModelOptions) -> pb.Result:
    """Answer LoadModel: a replica has its model before it serves, and never another one."""
    if request.Model in ("", spec.name, spec.source):
        return pb.Result(success=True, message=f"{spec.name} is loaded")
    return pb.Result(
        success=False,
        message=f"this replica has the model {spec.name!r}; the mesh loads models: apply {request.Model!r:.200}",
    )


class BackendServicer(backend_pb2_grpc.BackendServicer):
    """Every call of that protocol that the engine can answer."""

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        spec: ModelSpec,
        memory_bytes: Callable[[], int],
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._spec = spec
        self._memory_bytes = memory_bytes

    async def Health(self, request: pb.HealthMessage, context: Any) -> pb.Reply:  # noqa: ARG002 - gRPC's signature
        """Answer at once, also while requests run."""
        return pb.Reply(message=b"OK")

    async def LoadModel(self, request: pb.ModelOptions, context: Any) -> pb.Result:
        """Say that the model is loaded, if it is the one."""
        self._admission.check(context.invocation_metadata())
        return already_loaded(self._spec, request)

    async def Free(self, request: pb.HealthMessage, context: Any) -> pb.Result:  # noqa: ARG002 - gRPC's signature
        """Refuse: the mesh unloads models."""
        raise CapabilityUnsupported(
            "a client cannot unload a replica: the mesh does. Delete the model, or change its policy.",
            model=self._spec.name,
            capability="Free",
        )

    async def Predict(self, request: pb.PredictOptions, context: Any) -> pb.Reply:
        """Continue a text or answer a conversation."""
        with self._call(request, context):
            call = requests.predict_call(request, self._spec.name, streamed=False)
            whole, end = await collect(self._engine, self._pieces(call))
            return requests.whole_reply(whole, end, chat=isinstance(call, ChatCall))

    async def PredictStream(self, request: pb.PredictOptions, context: Any) -> AsyncGenerator[pb.Reply, None]:
        """Predict, piece by piece."""
        with self._call(request, context):
            call = requests.predict_call(request, self._spec.name, streamed=True)
            async with aclosing(self._pieces(call)) as pieces:
                async for piece in pieces:
                    yield requests.reply_of(piece, chat=isinstance(call, ChatCall))

    async def Embedding(self, request: pb.PredictOptions, context: Any) -> pb.EmbeddingResult:
        """Turn a text, or tokens, into a vector."""
        with self._call(request, context, Capability.EMBED):
            given = tuple(request.EmbeddingTokens) or request.Embeddings or request.Prompt
            if not given:
                raise InvalidRequest("Embeddings is empty.", field="Embeddings")
            result = await self._engine.embed((given,))
            vector = result.vectors[0]
            return pb.EmbeddingResult(
                embeddings=vector,
                tokens=1,
                dim=len(vector),
                prompt_tokens=result.prompt_tokens,
                layout=pb.EMBEDDING_LAYOUT_FINAL,
            )

    async def TokenizeString(self, request: pb.PredictOptions, context: Any) -> pb.TokenizationResponse:
        """Split a text into tokens."""
        with self._call(request, context, Capability.TOKENIZE):
            tokens = await self._engine.tokenize(request.Prompt, add_special=False)
            return pb.TokenizationResponse(length=len(tokens), tokens=tokens)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        """Join tokens."""
        with self._call(request, context, Capability.DETOKENIZE):
            return pb.DetokenizeResponse(content=await self._engine.detokenize(tuple(request.tokens)))

    async def Status(self, request: pb.HealthMessage, context: Any) -> pb.StatusResponse:  # noqa: ARG002
        """Say whether requests run, and how much memory the process takes."""
        memory = self._memory_bytes()
        return pb.StatusResponse(
            state=pb.StatusResponse.BUSY if self._admission.in_flight else pb.StatusResponse.READY,
            memory=pb.MemoryUsageData(total=memory, breakdown={"process": memory}),
        )

    async def Rerank(self, request: pb.RerankRequest, context: Any) -> pb.RerankResult:
        """Order documents by relevance."""
        with self._call(request, context, Capability.RERANK):
            if not request.query or not request.documents:
                raise InvalidRequest("query or documents is empty.", field="documents" if request.query else "query")
            documents = tuple(request.documents)
            ranking = await self._engine.rerank(request.query, documents, max(0, request.top_n))
            return pb.RerankResult(
                usage=pb.Usage(total_tokens=ranking.prompt_tokens, prompt_tokens=ranking.prompt_tokens),
                results=[
                    pb.DocumentResult(index=index, text=documents[index], relevance_score=score)
                    for index, score in ranking.results
                ],
            )

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        """Give the log-probability of each candidate."""
        with self._call(request, context, Capability.SCORE):
            if not request.prompt or not request.candidates or not all(request.candidates):
                field = "candidates" if request.prompt else "prompt"
                raise InvalidRequest(f"{field} is empty, or has an empty text.", field=field)
            scores = await self._engine.score(request.prompt, tuple(request.candidates))
            answer = pb.ScoreResponse()
            for score in scores:
                candidate = answer.candidates.add(log_prob=score.logprob, num_tokens=len(score.tokens))
                if request.length_normalize and score.tokens:
                    candidate.length_normalized_log_prob = score.logprob / len(score.tokens)
                if request.include_token_logprobs:
                    candidate.tokens.extend(pb.TokenLogProb(token=t.token, log_prob=t.logprob) for t in score.tokens)
            return answer

    async def TokenClassify(self, request: pb.TokenClassifyRequest, context: Any) -> pb.TokenClassifyResponse:  # noqa: ARG002
        """Refuse: no engine of ours does it."""
        self._check(request)
        raise CapabilityUnsupported(
            f"the engine {self._engine.name!r} does not classify tokens.",
            model=self._spec.name,
            capability="TokenClassify",
        )

    async def GetMetrics(self, request: pb.MetricsRequest, context: Any) -> pb.MetricsResponse:  # noqa: ARG002
        """Return what the engine counted since it was loaded."""
        metrics = await self._engine.metrics()
        return pb.MetricsResponse(
            tokens_per_second=metrics.tokens_per_second,
            tokens_generated=metrics.completion_tokens,
            prompt_tokens_processed=metrics.prompt_tokens,
        )

    async def ModelMetadata(self, request: pb.ModelOptions, context: Any) -> pb.ModelMetadataResponse:  # noqa: ARG002
        """Say what the model's template shows."""
        template = self._engine.loaded.chat_template
        return pb.ModelMetadataResponse(supports_thinking="enable_thinking" in template or "<think>" in template)

    def _pieces(self, call: GenerateCall | ChatCall) -> AsyncGenerator[Piece, None]:
        if isinstance(call, ChatCall):
            require(self._engine, self._spec.name, Capability.CHAT)
            return self._engine.chat(call)
        require(self._engine, self._spec.name, Capability.GENERATE)
        return self._engine.generate(call)

    @contextmanager
    def _call(self, request: Any, context: Any, capability: Capability | None = None) -> Iterator[None]:
        self._check(request)
        with self._admission.admit(context.invocation_metadata()):
            if capability is not None:
                require(self._engine, self._spec.name, capability)
            yield

    def _check(self, request: Any) -> None:
        """Refuse what is meant for another model, in the words that clients of that protocol look for."""
        identity = getattr(request, "ModelIdentity", "")
        if identity and identity != self._spec.name:
            raise ModelNotFound(
                f"model identity mismatch: loaded {self._spec.name!r}, requested {identity!r:.200}",
                model=identity,
            )
