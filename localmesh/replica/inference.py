"""localmesh.v1.InferenceService of one replica."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from localmesh.core.errors import EngineFailed
from localmesh.replica import typed_requests as typed
from localmesh.replica.admission import Admission
from localmesh.replica.engines.base import Capability, End, Engine, Piece, require
from localmesh.v1 import inference_service_pb2 as pb
from localmesh.v1 import inference_service_pb2_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name


class InferenceServicer(inference_service_pb2_grpc.InferenceServiceServicer):
    """Every call: let in or refused, read, done by the engine, answered."""

    def __init__(self, engine: Engine, admission: Admission) -> None:
        self._engine = engine
        self._admission = admission

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        """See the proto."""
        with self._call(request, context, Capability.GENERATE):
            whole, end = await collect(self._engine, self._engine.generate(typed.generate_call(request)))
            return pb.GenerateResponse(
                text=whole.text, logprobs=typed.logprobs_of(whole.logprobs), **typed.end_fields(end)
            )

    async def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Any
    ) -> AsyncGenerator[pb.StreamGenerateResponse, None]:
        """See the proto."""
        with self._call(request, context, Capability.GENERATE):
            async with aclosing(self._engine.generate(typed.generate_call(request))) as pieces:
                async for piece in pieces:
                    yield pb.StreamGenerateResponse(
                        text=piece.text,
                        logprobs=typed.logprobs_of(piece.logprobs),
                        **(typed.end_fields(piece.end) if piece.end else {}),
                    )

    async def Chat(self, request: pb.ChatRequest, context: Any) -> pb.ChatResponse:
        """See the proto."""
        with self._call(request, context, Capability.CHAT):
            whole, end = await collect(self._engine, self._engine.chat(typed.chat_call(request)))
            return pb.ChatResponse(
                message=whole.message, logprobs=typed.logprobs_of(whole.logprobs), **typed.end_fields(end)
            )

    async def StreamChat(
        self, request: pb.StreamChatRequest, context: Any
    ) -> AsyncGenerator[pb.StreamChatResponse, None]:
        """See the proto."""
        with self._call(request, context, Capability.CHAT):
            async with aclosing(self._engine.chat(typed.chat_call(request))) as pieces:
                async for piece in pieces:
                    yield pb.StreamChatResponse(
                        content=piece.text,
                        reasoning=piece.reasoning,
                        tool_calls=typed.call_deltas(piece.tool_calls),
                        logprobs=typed.logprobs_of(piece.logprobs),
                        **(typed.end_fields(piece.end) if piece.end else {}),
                    )

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        """See the proto."""
        with self._call(request, context, Capability.EMBED):
            result = await self._engine.embed(typed.embed_inputs(request))
            return pb.EmbedResponse(
                embeddings=[pb.Embedding(values=vector) for vector in result.vectors],
                usage=pb.Usage(prompt_tokens=result.prompt_tokens),
            )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """See the proto."""
        with self._call(request, context, Capability.TOKENIZE):
            tokens = await self._engine.tokenize(request.text, add_special=request.add_special)
            return pb.TokenizeResponse(tokens=tokens)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        """See the proto."""
        with self._call(request, context, Capability.DETOKENIZE):
            return pb.DetokenizeResponse(text=await self._engine.detokenize(typed.tokens_of(request)))

    async def Rerank(self, request: pb.RerankRequest, context: Any) -> pb.RerankResponse:
        """See the proto."""
        with self._call(request, context, Capability.RERANK):
            query, documents, top_n = typed.rerank_arguments(request)
            ranking = await self._engine.rerank(query, documents, top_n)
            return pb.RerankResponse(
                results=[pb.RankedDocument(index=index, score=score) for index, score in ranking.results],
                usage=pb.Usage(prompt_tokens=ranking.prompt_tokens),
            )

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        """See the proto."""
        with self._call(request, context, Capability.SCORE):
            prompt, candidates = typed.score_arguments(request)
            scores = await self._engine.score(prompt, candidates)
            return pb.ScoreResponse(
                candidates=[pb.CandidateScore(logprob=s.logprob, tokens=len(s.tokens)) for s in scores]
            )

    @contextmanager
    def _call(self, request: Any, context: Any, capability: Capability) -> Iterator[None]:
        with self._admission.admit(context.invocation_metadata()):
            self._admission.check_model(request.model)
            require(self._engine, self._admission.replica.model, capability)
            yield


async def collect(engine: Engine, pieces: AsyncGenerator[Piece, None]) -> tuple[typed.Collector, End]:
    """Return a whole answer and how it ended.

    Raises:
        EngineFailed: It was cut short.
    """
    whole = typed.Collector()
    async with aclosing(pieces):
        async for piece in pieces:
            whole.add(piece)
    if whole.end is None:
        raise EngineFailed("the engine's answer was cut short.", engine=engine.name)
    return whole, whole.end
