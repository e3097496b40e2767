"""The engines' calls as backend.Backend's messages, and that protocol's replies as pieces. Pure."""

import codecs
import json
from typing import Any

from localmesh.core.errors import LoadFailed
from localmesh.core.records import ModelSpec
from localmesh.replica.engines.base import (
    Alternative,
    CallPiece,
    ChatCall,
    End,
    Finish,
    GenerateCall,
    Message,
    Piece,
    Sampling,
    TokenLogprob,
)
from localmesh.replica.engines.json_grammar import grammar_of
from localmesh.thirdparty import backend_pb2 as pb

_DEFAULT_TEMPERATURE, _DEFAULT_TOP_P, _DEFAULT_TOP_K = 0.8, 0.95, 40
"""That protocol cannot say "not set"; these are llama.cpp's."""
_ALL_LAYERS = 99_999


def model_options(spec: ModelSpec, source_path: str, *, gpu: bool, ours: frozenset[str]) -> pb.ModelOptions:
    """Return what LoadModel is told.

    The spec's options: one whose name is a field of ModelOptions ("Type", "TrustRemoteCode", ...) sets that field, all
    others are passed on as "name:value", but for those in `ours`.

    Raises:
        LoadFailed: A value is not what its field takes.
    """
    options = pb.ModelOptions(
        Model=spec.name,
        ModelFile=source_path,
        ModelPath=source_path.rpartition("/")[0],
        ContextSize=spec.context_tokens,
        Threads=max(1, spec.threads),
        NGPULayers=spec.gpu_layers if spec.gpu_layers is not None else (_ALL_LAYERS if gpu else 0),
        CUDA=gpu,
        MMap=True,
        Embeddings=spec.embeddings,
        CacheTypeKey=spec.cache_type,
        CacheTypeValue=spec.cache_type,
    )
    fields = pb.ModelOptions.DESCRIPTOR.fields_by_name
    for name, value in sorted(spec.options.items()):
        if name in ours:
            continue
        if name not in fields:
            options.Options.append(f"{name}:{value}")
            continue
        try:
            setattr(options, name, _typed(fields[name], value))
        except (ValueError, TypeError, AttributeError) as error:
            raise LoadFailed(f"option {name}: {value!r} does not fit: {error}", model=spec.name) from None
    return options


def _typed(field: Any, value: str) -> Any:
    if field.cpp_type == field.CPPTYPE_STRING:
        return value
    if field.cpp_type == field.CPPTYPE_BOOL:
        if value not in ("true", "false"):
            raise ValueError("true or false is expected")
        return value == "true"
    if field.cpp_type == field.CPPTYPE_FLOAT:
        return float(value)
    return int(value)


def predict_options(call: GenerateCall | ChatCall, identity: str) -> pb.PredictOptions:
    """Return what Predict and PredictStream are told.

    Raises:
        InvalidRequest: The JSON Schema cannot be made into a grammar.
    """
    options = pb.PredictOptions(ModelIdentity=identity)
    _set_sampling(options, call.sampling)
    if isinstance(call, GenerateCall):
        options.Prompt = call.prompt
        return options
    options.UseTokenizerTemplate = True
    options.Messages.extend(_message(m) for m in call.messages)
    if call.tools:
        options.Tools = json.dumps(
            [
                {
                    "type": "function",
                    "function": {"name": t.name, "description": t.description, "parameters": dict(t.parameters)},
                }
                for t in call.tools
            ]
        )
        options.ToolChoice = call.tool_choice
    return options


def _set_sampling(options: pb.PredictOptions, sampling: Sampling) -> None:
    options.Tokens = sampling.max_tokens or 0
    options.Temperature = _or(sampling.temperature, _DEFAULT_TEMPERATURE)
    options.TopP = _or(sampling.top_p, _DEFAULT_TOP_P)
    options.TopK = int(_or(sampling.top_k, _DEFAULT_TOP_K))
    options.MinP = sampling.min_p or 0.0
    options.Seed = (sampling.seed or 0) & 0x7FFFFFFF
    options.StopPrompts.extend(sampling.stop)
    options.Penalty = sampling.repeat_penalty or 0.0
    options.FrequencyPenalty = sampling.frequency_penalty or 0.0
    options.PresencePenalty = sampling.presence_penalty or 0.0
    options.IgnoreEOS = sampling.ignore_end
    if sampling.logprobs is not None:
        options.Logprobs = 1
        options.TopLogprobs = sampling.logprobs
    if sampling.json_schema is not None:
        options.Grammar = grammar_of(sampling.json_schema)
    elif sampling.grammar:
        options.Grammar = sampling.grammar


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _message(message: Message) -> pb.Message:
    calls = [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c in message.tool_calls
    ]
    return pb.Message(
        role=message.role,
        content=message.content,
        name=message.name,
        reasoning_content=message.reasoning,
        tool_call_id=message.tool_call_id,
        tool_calls=json.dumps(calls) if calls else "",
    )


class ReplyReader:
    """Makes pieces of replies. Text is UTF-8 that may be cut anywhere."""

    def __init__(self, max_tokens: int | None) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._max_tokens = max_tokens
        self._last = pb.Reply()
        self._called_tools = False

    def piece(self, reply: pb.Reply) -> Piece | None:
        """Return what a reply has for the caller, or None."""
        if reply.tokens or reply.prompt_tokens:
            self._last = reply
        deltas = reply.chat_deltas
        calls = tuple(
            CallPiece(index=c.index, id=c.id, name=c.name, arguments=c.arguments) for d in deltas for c in d.tool_calls
        )
        self._called_tools |= bool(calls)
        text = "".join(d.content for d in deltas) if deltas else self._decoder.decode(reply.message)
        reasoning = "".join(d.reasoning_content for d in deltas)
        logprobs = _logprobs(reply.logprobs)
        if not (text or reasoning or calls or logprobs):
            return None
        return Piece(text=text, reasoning=reasoning, tool_calls=calls, logprobs=logprobs)

    def end(self) -> Piece:
        """Return the last piece. Why the text ended is a guess where the protocol does not say."""
        made = self._last.tokens
        finish = Finish.STOP
        if self._called_tools:
            finish = Finish.TOOL_CALLS
        elif self._max_tokens is not None and made >= self._max_tokens:
            finish = Finish.LENGTH
        return Piece(
            text=self._decoder.decode(b"", final=True),
            end=End(
                finish=finish,
                prompt_tokens=self._last.prompt_tokens,
                completion_tokens=made,
                prompt_seconds=max(0.0, self._last.timing_prompt_processing) / 1000,
                completion_seconds=max(0.0, self._last.timing_token_generation) / 1000,
            ),
        )


def _logprobs(raw: bytes) -> tuple[TokenLogprob, ...]:
    """Read log-probabilities of the OpenAI kind; what is not of that kind is none."""
    try:
        content = json.loads(raw)["content"] if raw else []
        return tuple(
            TokenLogprob(
                token=str(entry["token"]),
                logprob=float(entry["logprob"]),
                alternatives=tuple(
                    Alternative(token=str(a["token"]), logprob=float(a["logprob"]))
                    for a in entry.get("top_logprobs") or ()
                ),
            )
            for entry in content
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return ()
