"""InferenceService's messages to the engines' calls and back. Everything that a caller may get wrong is found here."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from google.protobuf import json_format

from localmesh.core.errors import InvalidRequest
from localmesh.replica.engines import base
from localmesh.replica.engines.json_grammar import check_grammar, parse_json, parse_schema
from localmesh.v1 import inference_service_pb2 as pb

_MAX_STOPS = 64
_MAX_LOGPROBS = 20
_MAX_DOCUMENTS = 4096

_ROLES = {pb.ROLE_SYSTEM: "system", pb.ROLE_USER: "user", pb.ROLE_ASSISTANT: "assistant", pb.ROLE_TOOL: "tool"}
_CHOICES = {
    pb.TOOL_CHOICE_UNSPECIFIED: "auto",
    pb.TOOL_CHOICE_AUTO: "auto",
    pb.TOOL_CHOICE_NONE: "none",
    pb.TOOL_CHOICE_REQUIRED: "required",
}
_FINISHES = {
    base.Finish.STOP: pb.FINISH_REASON_STOP,
    base.Finish.LENGTH: pb.FINISH_REASON_LENGTH,
    base.Finish.TOOL_CALLS: pb.FINISH_REASON_TOOL_CALLS,
}
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "max_tokens": (lambda v: v >= 1, "at least 1"),
    "temperature": (lambda v: v >= 0, "at least 0"),
    "top_p": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "top_k": (lambda v: v >= 0, "at least 0"),
    "min_p": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "repeat_penalty": (lambda v: v > 0, "above 0"),
    "frequency_penalty": (lambda v: -2 <= v <= 2, "from -2 to 2"),
    "presence_penalty": (lambda v: -2 <= v <= 2, "from -2 to 2"),
    "logprobs": (lambda v: 0 <= v <= _MAX_LOGPROBS, f"from 0 to {_MAX_LOGPROBS}"),
}


def check_range(field: str, value: float, allowed: Callable[[float], bool], says: str) -> None:
    """Check a number of a request.

    Raises:
        InvalidRequest: It is not allowed, or not finite.
    """
    if not math.isfinite(value) or not allowed(value):
        raise InvalidRequest(f"{field} is {value}: it must be {says}.", field=field)


def sampling_of(options: pb.SamplingOptions) -> base.Sampling:
    """Return the sampling that a request asks for.

    Raises:
        InvalidRequest: A field is out of its range, or a constraint cannot be read.
    """
    values: dict[str, Any] = {}
    for name, (allowed, says) in _RANGES.items():
        if options.HasField(name):  # type: ignore[arg-type]  # the table's names are the message's
            values[name] = getattr(options, name)
            check_range(f"sampling.{name}", values[name], allowed, says)
    if len(options.stop) > _MAX_STOPS or not all(options.stop):
        raise InvalidRequest(
            f"sampling.stop has {len(options.stop)} texts: at most {_MAX_STOPS}, none of them empty.",
            field="sampling.stop",
        )
    constraint = options.WhichOneof("constraint")
    if constraint == "grammar":
        if not options.grammar.strip():
            raise InvalidRequest("sampling.grammar is empty.", field="sampling.grammar")
        check_grammar(options.grammar)
    return base.Sampling(
        **values,
        seed=options.seed if options.HasField("seed") else None,
        stop=tuple(options.stop),
        json_schema=parse_schema(options.json_schema) if constraint == "json_schema" else None,
        grammar=options.grammar if constraint == "grammar" else "",
    )


def generate_call(request: pb.GenerateRequest | pb.StreamGenerateRequest) -> base.GenerateCall:
    """Return the call that a request asks for.

    Raises:
        InvalidRequest: A field is not acceptable; it is named.
    """
    if not request.prompt:
        raise InvalidRequest("prompt is empty.", field="prompt")
    return base.GenerateCall(
        prompt=request.prompt,
        sampling=sampling_of(request.sampling),
        streamed=isinstance(request, pb.StreamGenerateRequest),
    )


def chat_call(request: pb.ChatRequest | pb.StreamChatRequest) -> base.ChatCall:
    """Return the call that a request asks for.

    Raises:
        InvalidRequest: A field is not acceptable; it is named.
    """
    if not request.messages:
        raise InvalidRequest("messages is empty: a conversation has at least one message.", field="messages")
    sampling = sampling_of(request.sampling)
    if sampling.grammar and request.tools:
        raise InvalidRequest("sampling.grammar cannot be used together with tools.", field="sampling.grammar")
    if request.tool_choice not in _CHOICES:
        raise InvalidRequest(f"tool_choice {request.tool_choice} is not known.", field="tool_choice")
    if request.tool_choice == pb.TOOL_CHOICE_REQUIRED and not request.tools:
        raise InvalidRequest("tool_choice demands a tool call, but there are no tools.", field="tool_choice")
    return base.ChatCall(
        messages=tuple(_message(m, i) for i, m in enumerate(request.messages)),
        sampling=sampling,
        tools=tuple(_tool(t, i) for i, t in enumerate(request.tools)),
        tool_choice=_CHOICES[request.tool_choice],
        streamed=isinstance(request, pb.StreamChatRequest),
    )


def _message(message: pb.ChatMessage, place: int) -> base.Message:
    at = f"messages[{place}]"
    if message.role not in _ROLES:
        raise InvalidRequest(f"{at}.role is not set, or not known.", field=f"{at}.role")
    calls = []
    for index, call in enumerate(message.tool_calls):
        field = f"{at}.tool_calls[{index}]"
        if not call.name:
            raise InvalidRequest(f"{field}.name is empty.", field=f"{field}.name")
        arguments = call.arguments or "{}"
        if not isinstance(parse_json(arguments, f"{field}.arguments"), dict):
            raise InvalidRequest(f"{field}.arguments is not a JSON object.", field=f"{field}.arguments")
        calls.append(base.Call(id=call.id, name=call.name, arguments=arguments))
    return base.Message(
        role=_ROLES[message.role],
        content=message.content,
        reasoning=message.reasoning,
        tool_calls=tuple(calls),
        tool_call_id=message.tool_call_id,
    )


def _tool(tool: pb.Tool, place: int) -> base.ToolSpec:
    if not tool.name:
        raise InvalidRequest(f"tools[{place}].name is empty.", field=f"tools[{place}].name")
    try:
        parameters = json_format.MessageToDict(tool.parameters)
    except json_format.Error as error:  # NaN and infinity are no JSON
        raise InvalidRequest(
            f"tools[{place}].parameters is no JSON: {error}.", field=f"tools[{place}].parameters"
        ) from None
    return base.ToolSpec(
        name=tool.name, description=tool.description, parameters=parameters or {"type": "object", "properties": {}}
    )


def embed_inputs(request: pb.EmbedRequest) -> tuple[str, ...]:
    """Return the texts to embed.

    Raises:
        InvalidRequest: There are none, or one is empty.
    """
    return _texts(request.inputs, "inputs")


def tokens_of(request: pb.DetokenizeRequest) -> tuple[int, ...]:
    """Return the tokens to join.

    Raises:
        InvalidRequest: There are none.
    """
    if not request.tokens:
        raise InvalidRequest("tokens is empty.", field="tokens")
    return tuple(request.tokens)


def rerank_arguments(request: pb.RerankRequest) -> tuple[str, tuple[str, ...], int]:
    """Return query, documents and the number of results wanted (0: all).

    Raises:
        InvalidRequest: A field is not acceptable; it is named.
    """
    if not request.query:
        raise InvalidRequest("query is empty.", field="query")
    if request.top_n < 0:
        raise InvalidRequest(f"top_n is {request.top_n}: it must be at least 0.", field="top_n")
    return request.query, _texts(request.documents, "documents"), request.top_n


def score_arguments(request: pb.ScoreRequest) -> tuple[str, tuple[str, ...]]:
    """Return prompt and candidates.

    Raises:
        InvalidRequest: A field is not acceptable; it is named.
    """
    if not request.prompt:
        raise InvalidRequest("prompt is empty.", field="prompt")
    return request.prompt, _texts(request.candidates, "candidates")


def _texts(texts: Sequence[str], field: str) -> tuple[str, ...]:
    if not texts or len(texts) > _MAX_DOCUMENTS:
        raise InvalidRequest(f"{field} has {len(texts)} texts: it must be 1 to {_MAX_DOCUMENTS}.", field=field)
    for place, text in enumerate(texts):
        if not text:
            raise InvalidRequest(f"{field}[{place}] is empty.", field=f"{field}[{place}]")
    return tuple(texts)


def end_fields(end: base.End) -> dict[str, Any]:
    """Return the fields that every last message has."""
    timings = pb.Timings()
    timings.prompt.FromNanoseconds(int(end.prompt_seconds * 1e9))
    timings.completion.FromNanoseconds(int(end.completion_seconds * 1e9))
    return {
        "finish_reason": _FINISHES[end.finish],
        "usage": pb.Usage(prompt_tokens=end.prompt_tokens, completion_tokens=end.completion_tokens),
        "timings": timings,
    }


def logprobs_of(logprobs: Iterable[base.TokenLogprob]) -> list[pb.TokenLogprob]:
    """Return log-probabilities as messages."""
    return [
        pb.TokenLogprob(
            token=entry.token,
            logprob=entry.logprob,
            alternatives=[pb.AlternativeToken(token=a.token, logprob=a.logprob) for a in entry.alternatives],
        )
        for entry in logprobs
    ]


def call_deltas(pieces: Iterable[base.CallPiece]) -> list[pb.ToolCallDelta]:
    """Return pieces of tool calls as messages."""
    return [pb.ToolCallDelta(index=p.index, id=p.id, name=p.name, arguments=p.arguments) for p in pieces]


class Collector:
    """Puts the pieces of an answer together."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, pb.ToolCall] = {}
        self.logprobs: list[base.TokenLogprob] = []
        self.end: base.End | None = None

    def add(self, piece: base.Piece) -> None:
        """Add the next piece."""
        self._text.append(piece.text)
        self._reasoning.append(piece.reasoning)
        self.logprobs += piece.logprobs
        for part in piece.tool_calls:
            call = self._calls.setdefault(part.index, pb.ToolCall())
            call.id = call.id or part.id
            call.name = call.name or part.name
            call.arguments += part.arguments
        self.end = piece.end or self.end

    @property
    def text(self) -> str:
        """All text."""
        return "".join(self._text)

    @property
    def message(self) -> pb.ChatMessage:
        """The answer as a message."""
        return pb.ChatMessage(
            role=pb.ROLE_ASSISTANT,
            content=self.text,
            reasoning="".join(self._reasoning),
            tool_calls=[self._calls[i] for i in sorted(self._calls)],
        )
