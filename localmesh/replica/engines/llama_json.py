"""What llama.cpp's server is told and what it answers, as JSON. Pure.

Bodies follow its OpenAI-like endpoints; where it knows more (grammars, timings), its own fields.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from localmesh.core.errors import CapabilityUnsupported, EngineFailed, InvalidRequest, MeshError, PromptTooLong
from localmesh.core.ids import ModelName
from localmesh.replica.engines.base import (
    Alternative,
    CallPiece,
    ChatCall,
    End,
    EngineMetrics,
    Finish,
    GenerateCall,
    Message,
    Piece,
    Sampling,
    TokenLogprob,
)
from localmesh.replica.engines.json_grammar import grammar_of
from localmesh.replica.engines.llama_http import LlamaHttpError

ENGINE = "llama"

_SEED_RANDOM = 0xFFFFFFFF
_TOO_LARGE_INPUT = re.compile(r"input \((\d+) tokens\) is (?:too large|larger)")
_BATCH_SIZE = re.compile(r"(?:batch|context) size[^0-9]*(\d+)")
_METRIC = re.compile(r"^llamacpp:(\w+) ([0-9.e+-]+)$", re.MULTILINE)


def generate_body(call: GenerateCall) -> dict[str, Any]:
    """Return the body for /v1/completions.

    Raises:
        InvalidRequest: The JSON Schema cannot be made into a grammar.
    """
    body = _sampling(call.sampling) | {"prompt": call.prompt}
    if call.sampling.logprobs is not None:
        body["logprobs"] = max(1, call.sampling.logprobs)
    if call.sampling.json_schema is not None:
        # That endpoint ignores a schema that it cannot read, and goes on without: so it is given a grammar of ours.
        body["grammar"] = grammar_of(call.sampling.json_schema)
    return body


def chat_body(call: ChatCall) -> dict[str, Any]:
    """Return the body for /v1/chat/completions."""
    body = _sampling(call.sampling) | {"messages": [_message(m) for m in call.messages]}
    if call.sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": max(1, call.sampling.logprobs)}
    if call.sampling.json_schema is not None:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": call.sampling.json_schema},
        }
    tools, choice = call.tools, call.tool_choice
    if choice.startswith("function:"):
        tools, choice = tuple(t for t in tools if t.name == choice.removeprefix("function:")), "required"
    if tools:
        body["tools"] = [
            {
                "type": "function",
                "function": {"name": t.name, "description": t.description, "parameters": dict(t.parameters)},
            }
            for t in tools
        ]
        body["tool_choice"] = choice
    return body


def _sampling(sampling: Sampling) -> dict[str, Any]:
    body: dict[str, Any] = {
        "max_tokens": -1 if sampling.max_tokens is None else sampling.max_tokens,
        # a reused prompt is computed in batches of another size, which may change the last digits: not with a seed
        "cache_prompt": sampling.seed is None,
    }
    optional = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repeat_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
    }
    body |= {key: value for key, value in optional.items() if value is not None}
    if sampling.seed is not None:
        seed = sampling.seed & 0xFFFFFFFF
        body["seed"] = seed if seed != _SEED_RANDOM else seed - 1
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.grammar:
        body["grammar"] = sampling.grammar
    if sampling.ignore_end:
        body["ignore_eos"] = True
    return body


def _message(message: Message) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        body["name"] = message.name
    if message.reasoning:
        body["reasoning_content"] = message.reasoning
    if message.tool_call_id:
        body["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        body["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
    return body


def piece_of(event: Mapping[str, Any], *, alternatives: int) -> Piece | None:
    """Return the piece in an event of a streamed answer, or in a whole one; None where there is nothing for the caller.

    It never has an `end`: usage may come in an event of its own. See EndBuilder.
    """
    text = reasoning = ""
    calls: list[CallPiece] = []
    logprobs: tuple[TokenLogprob, ...] = ()
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or choice.get("message") or {}
        text += choice.get("text") or delta.get("content") or ""
        reasoning += delta.get("reasoning_content") or ""
        calls += [_call_piece(c, place) for place, c in enumerate(delta.get("tool_calls") or ())]
        logprobs += _logprobs((choice.get("logprobs") or {}).get("content"), alternatives)
    if not (text or reasoning or calls or logprobs):
        return None
    return Piece(text=text, reasoning=reasoning, tool_calls=tuple(calls), logprobs=logprobs)


def _call_piece(raw: Mapping[str, Any], place: int) -> CallPiece:
    function = raw.get("function") or {}
    return CallPiece(
        index=int(raw.get("index", place)),
        id=raw.get("id") or "",
        name=function.get("name") or "",
        arguments=function.get("arguments") or "",
    )


def _logprobs(raw: Sequence[Mapping[str, Any]] | None, alternatives: int) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token=str(entry.get("token", "")),
            logprob=float(entry.get("logprob", 0.0)),
            alternatives=tuple(
                Alternative(token=str(a.get("token", "")), logprob=float(a.get("logprob", 0.0)))
                for a in (entry.get("top_logprobs") or ())[:alternatives]
            ),
        )
        for entry in raw or ()
    )


class EndBuilder:
    """Collects from the events of one streamed answer why and at what cost it ended."""

    def __init__(self) -> None:
        self._finish = ""
        self._usage: Mapping[str, Any] = {}
        self._timings: Mapping[str, Any] = {}

    def look_at(self, event: Mapping[str, Any]) -> None:
        """Take what the event says of the end."""
        for choice in event.get("choices") or ():
            self._finish = choice.get("finish_reason") or self._finish
        self._usage = event.get("usage") or self._usage
        self._timings = event.get("timings") or self._timings

    def end(self) -> End:
        """Return it, after the last event."""
        finish = {"length": Finish.LENGTH, "tool_calls": Finish.TOOL_CALLS}.get(self._finish, Finish.STOP)
        return End(
            finish=finish,
            prompt_tokens=int(self._usage.get("prompt_tokens", 0)),
            completion_tokens=int(self._usage.get("completion_tokens", 0)),
            prompt_seconds=float(self._timings.get("prompt_ms", 0.0)) / 1000,
            completion_seconds=float(self._timings.get("predicted_ms", 0.0)) / 1000,
        )


def error_of(
    error: LlamaHttpError, model: ModelName, *, field: str = "", sampling: Sampling | None = None
) -> MeshError:
    """Return what the server's error means to a caller.

    Args:
        error: The server's answer.
        model: For the metadata.
        field: The request's field that is to blame where the server does not tell.
        sampling: The request's sampling, if it had one: its constraint is to blame for errors of grammars.
    """
    body, text = error.body, error.message
    if error.kind == "exceed_context_size_error":
        return too_long(int(body.get("n_prompt_tokens", 0)), int(body.get("n_ctx", 0)))
    if found := _TOO_LARGE_INPUT.search(text):
        size = _BATCH_SIZE.search(text)
        return too_long(int(found[1]), int(size[1]) if size else 0)
    if error.status == 400:
        if "grammar" in text.lower() or "schema" in text.lower():
            field = _constraint_field(sampling) or "tools"
        return InvalidRequest(f"llama.cpp does not accept the request: {text}", field=field)
    if error.status == 501:
        return CapabilityUnsupported(f"the model {model!r} cannot do this: {text}", model=model, capability="")
    return EngineFailed(f"llama.cpp failed at this request: {text}", engine=ENGINE)


def too_long(prompt_tokens: int, context_tokens: int) -> PromptTooLong:
    """Return the error for a prompt that does not fit."""
    return PromptTooLong(
        f"the prompt has {prompt_tokens} tokens, the model's context {context_tokens}: shorten the prompt, or raise"
        " context_tokens in the model's spec.",
        prompt_tokens=prompt_tokens,
        context_tokens=context_tokens,
    )


def _constraint_field(sampling: Sampling | None) -> str:
    if sampling is not None and sampling.grammar:
        return "sampling.grammar"
    if sampling is not None and sampling.json_schema is not None:
        return "sampling.json_schema"
    return ""


def metrics_of(text: str) -> EngineMetrics:
    """Read the server's metrics page."""
    values = {name: float(value) for name, value in _METRIC.findall(text)}
    return EngineMetrics(
        prompt_tokens=int(values.get("prompt_tokens_total", 0)),
        completion_tokens=int(values.get("tokens_predicted_total", 0)),
        tokens_per_second=values.get("predicted_tokens_seconds", 0.0),
    )
