"""backend.Backend's messages to the engines' calls and back.

In that protocol 0 and empty mean "not set", but for the temperature: 0 is 0. Durations are milliseconds.
"""

import json
from typing import Any

from localmesh.core.errors import CapabilityUnsupported, InvalidRequest
from localmesh.core.ids import ModelName
from localmesh.replica.engines import base
from localmesh.replica.engines.json_grammar import check_grammar, parse_json
from localmesh.replica.typed_requests import Collector, check_range
from localmesh.thirdparty import backend_pb2 as pb

_ROLES = frozenset({"system", "user", "assistant", "tool", "developer"})
_MAX_LOGPROBS = 20


def predict_call(options: pb.PredictOptions, model: ModelName, *, streamed: bool) -> base.GenerateCall | base.ChatCall:
    """Return the call that the options ask for: a chat where the model's own template is to be used.

    Raises:
        InvalidRequest: A field is not acceptable; it is named.
        CapabilityUnsupported: There are images, videos or audio.
    """
    for field in ("Images", "Videos", "Audios"):
        if getattr(options, field):
            raise CapabilityUnsupported(
                f"the model {model!r} reads no {field.lower()}.", model=model, capability=field.lower()
            )
    sampling = _sampling(options)
    if not (options.UseTokenizerTemplate and options.Messages):
        if not options.Prompt:
            raise InvalidRequest("Prompt is empty.", field="Prompt")
        return base.GenerateCall(prompt=options.Prompt, sampling=sampling, streamed=streamed)
    tools = _tools(options.Tools)
    if tools and sampling.grammar:
        raise InvalidRequest("Grammar cannot be used together with Tools.", field="Grammar")
    return base.ChatCall(
        messages=tuple(_message(m, i) for i, m in enumerate(options.Messages)),
        sampling=sampling,
        tools=tools,
        tool_choice=_tool_choice(options.ToolChoice, tools),
        streamed=streamed,
    )


def _sampling(options: pb.PredictOptions) -> base.Sampling:
    check_range("Tokens", options.Tokens, lambda v: v >= -1, "at least 0")
    check_range("Temperature", options.Temperature, lambda v: v >= 0, "at least 0")
    check_range("TopP", options.TopP, lambda v: 0 <= v <= 1, "from 0 to 1")
    check_range("MinP", options.MinP, lambda v: 0 <= v <= 1, "from 0 to 1")
    check_range("TopK", options.TopK, lambda v: v >= 0, "at least 0")
    check_range("Penalty", options.Penalty, lambda v: v >= 0, "at least 0")
    check_range("FrequencyPenalty", options.FrequencyPenalty, lambda v: -2 <= v <= 2, "from -2 to 2")
    check_range("PresencePenalty", options.PresencePenalty, lambda v: -2 <= v <= 2, "from -2 to 2")
    if options.Grammar:
        check_grammar(options.Grammar)
    asked = options.TopLogprobs or options.Logprobs
    return base.Sampling(
        max_tokens=options.Tokens if options.Tokens > 0 else None,
        temperature=options.Temperature,
        top_p=options.TopP or None,
        top_k=options.TopK or None,
        min_p=options.MinP or None,
        seed=options.Seed if options.Seed > 0 else None,
        stop=tuple(s for s in options.StopPrompts if s),
        repeat_penalty=options.Penalty or None,
        frequency_penalty=options.FrequencyPenalty or None,
        presence_penalty=options.PresencePenalty or None,
        logprobs=min(max(0, options.TopLogprobs), _MAX_LOGPROBS) if asked > 0 else None,
        grammar=options.Grammar,
        ignore_end=options.IgnoreEOS,
    )


def _message(message: pb.Message, place: int) -> base.Message:
    if message.role not in _ROLES:
        raise InvalidRequest(f"Messages[{place}].role is {message.role!r:.80}.", field=f"Messages[{place}].role")
    field = f"Messages[{place}].tool_calls"
    calls = []
    for raw in _list(message.tool_calls, field):
        function = raw.get("function", raw)
        arguments = function.get("arguments", "{}") if isinstance(function, dict) else None
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequest(f"{field} has a call without a function's name.", field=field)
        if not isinstance(parse_json(arguments or "{}", field), dict):
            raise InvalidRequest(f"{field} has arguments that are no JSON object.", field=field)
        calls.append(base.Call(id=str(raw.get("id", "")), name=function["name"], arguments=arguments or "{}"))
    return base.Message(
        role="system" if message.role == "developer" else message.role,
        content=message.content,
        reasoning=message.reasoning_content,
        name=message.name,
        tool_calls=tuple(calls),
        tool_call_id=message.tool_call_id,
    )


def _tools(text: str) -> tuple[base.ToolSpec, ...]:
    tools = []
    for raw in _list(text, "Tools"):
        function = raw.get("function", raw)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequest("Tools has a tool without a function's name.", field="Tools")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, dict):
            raise InvalidRequest("Tools has parameters that are no JSON Schema.", field="Tools")
        description = str(function.get("description", ""))
        tools.append(base.ToolSpec(name=function["name"], description=description, parameters=parameters))
    return tuple(tools)


def _tool_choice(text: str, tools: tuple[base.ToolSpec, ...]) -> str:
    """Return the choice in a text that is a word, or an object of the OpenAI kind in JSON."""
    if not text or not tools:
        return "auto"
    choice = parse_json(text, "ToolChoice") if text.lstrip()[:1] in ("{", '"') else text
    if isinstance(choice, str) and choice in ("auto", "none", "required"):
        return choice
    name = choice.get("function", {}) if isinstance(choice, dict) else None
    name = name.get("name") if isinstance(name, dict) else None
    if not isinstance(name, str) or all(t.name != name for t in tools):
        raise InvalidRequest(f"ToolChoice is not known: {text!r:.200}.", field="ToolChoice")
    return f"function:{name}"


def _list(text: str, field: str) -> list[dict[str, Any]]:
    """Return the objects of a JSON list; empty text is an empty list."""
    if not text:
        return []
    value = parse_json(text, field)
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise InvalidRequest(f"{field} is not a JSON list of objects.", field=field)
    return value


def reply_of(piece: base.Piece, *, chat: bool) -> pb.Reply:
    """Return a piece of an answer as a message."""
    reply = pb.Reply(message=piece.text.encode())
    if piece.logprobs:
        reply.logprobs = _logprobs(piece.logprobs)
    if chat and (piece.text or piece.reasoning or piece.tool_calls):
        reply.chat_deltas.append(
            pb.ChatDelta(
                content=piece.text,
                reasoning_content=piece.reasoning,
                tool_calls=[
                    pb.ToolCallDelta(index=p.index, id=p.id, name=p.name, arguments=p.arguments)
                    for p in piece.tool_calls
                ],
            )
        )
    if piece.end:
        _set_end(reply, piece.end)
    return reply


def whole_reply(whole: Collector, end: base.End, *, chat: bool) -> pb.Reply:
    """Return a whole answer as one message."""
    reply = pb.Reply(message=whole.text.encode())
    if whole.logprobs:
        reply.logprobs = _logprobs(whole.logprobs)
    if chat:
        message = whole.message
        reply.chat_deltas.append(
            pb.ChatDelta(
                content=message.content,
                reasoning_content=message.reasoning,
                tool_calls=[
                    pb.ToolCallDelta(index=i, id=c.id, name=c.name, arguments=c.arguments)
                    for i, c in enumerate(message.tool_calls)
                ],
            )
        )
    _set_end(reply, end)
    return reply


def _set_end(reply: pb.Reply, end: base.End) -> None:
    reply.tokens = end.completion_tokens
    reply.prompt_tokens = end.prompt_tokens
    reply.timing_prompt_processing = end.prompt_seconds * 1000
    reply.timing_token_generation = end.completion_seconds * 1000


def _logprobs(logprobs: tuple[base.TokenLogprob, ...] | list[base.TokenLogprob]) -> bytes:
    content = [
        {
            "token": entry.token,
            "logprob": entry.logprob,
            "top_logprobs": [{"token": a.token, "logprob": a.logprob} for a in entry.alternatives],
        }
        for entry in logprobs
    ]
    return json.dumps({"content": content}).encode()
