"""What engines are told and what they answer, without any engine."""

from typing import Any

import pytest

from localmesh.core.errors import EngineUnavailable, LoadFailed
from localmesh.core.ids import ModelName
from localmesh.core.records import ModelSpec
from localmesh.replica.engines import llama_json
from localmesh.replica.engines.backend_messages import ReplyReader, model_options, predict_options
from localmesh.replica.engines.base import ChatCall, Finish, GenerateCall, Message, Sampling, ToolSpec
from localmesh.replica.engines.llama_http import LlamaHttpError
from localmesh.replica.engines.preflight import check_cpu_flags
from localmesh.thirdparty import backend_pb2

MODEL = ModelName("m")


def test_unset_sampling_leaves_llama_cpp_its_defaults() -> None:
    body = llama_json.generate_body(GenerateCall(prompt="p"))
    assert body == {"prompt": "p", "max_tokens": -1, "cache_prompt": True}


def test_a_seed_turns_the_prompt_cache_off_and_never_means_random() -> None:
    body = llama_json.generate_body(GenerateCall(prompt="p", sampling=Sampling(seed=-1)))
    assert body["cache_prompt"] is False
    assert body["seed"] == 0xFFFFFFFE
    assert llama_json.generate_body(GenerateCall(prompt="p", sampling=Sampling(seed=2**40 + 5)))["seed"] == 5


def test_one_named_tool_is_required_by_leaving_out_the_others() -> None:
    tools = tuple(ToolSpec(name=n, description="", parameters={}) for n in ("a", "b"))
    call = ChatCall(messages=(Message(role="user", content="x"),), tools=tools, tool_choice="function:b")
    body = llama_json.chat_body(call)
    assert [t["function"]["name"] for t in body["tools"]] == ["b"]
    assert body["tool_choice"] == "required"


def test_the_end_of_a_stream_is_gathered_from_its_events() -> None:
    ending = llama_json.EndBuilder()
    ending.look_at({"choices": [{"text": "a", "finish_reason": None}]})
    ending.look_at({"choices": [{"text": "", "finish_reason": "length"}]})
    ending.look_at({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}})
    ending.look_at({"choices": [], "timings": {"prompt_ms": 1500, "predicted_ms": 250}})
    end = ending.end()
    assert (end.finish, end.prompt_tokens, end.completion_tokens) == (Finish.LENGTH, 3, 4)
    assert (end.prompt_seconds, end.completion_seconds) == (1.5, 0.25)


def test_an_event_with_nothing_for_the_caller_is_no_piece() -> None:
    assert llama_json.piece_of({"choices": [{"delta": {"role": "assistant", "content": None}}]}, alternatives=0) is None


@pytest.mark.parametrize(
    ("status", "body", "reason", "metadata"),
    [
        (
            400,
            {"type": "exceed_context_size_error", "n_prompt_tokens": 9, "n_ctx": 5},
            "PROMPT_TOO_LONG",
            {"prompt_tokens": "9", "context_tokens": "5"},
        ),
        (
            500,
            {"message": "input (99 tokens) is too large to process. increase the physical batch size"
             " (current batch size: 64)"},
            "PROMPT_TOO_LONG",
            {"prompt_tokens": "99", "context_tokens": "64"},
        ),
        (400, {"message": "failed to parse grammar"}, "INVALID_REQUEST", {"field": "sampling.grammar"}),
        (400, {"message": "whatever"}, "INVALID_REQUEST", {"field": "prompt"}),
        (501, {"message": "no"}, "CAPABILITY_UNSUPPORTED", {"model": "m", "capability": ""}),
        (500, {"message": "oops"}, "ENGINE_FAILED", {"engine": "llama"}),
    ],
)  # fmt: skip
def test_llama_cpps_errors_get_a_reason(
    status: int, body: dict[str, Any], reason: str, metadata: dict[str, str]
) -> None:
    error = llama_json.error_of(
        LlamaHttpError(status, body), MODEL, field="prompt", sampling=Sampling(grammar="root ::= x")
    )
    assert error.reason == reason
    assert error.metadata == metadata


def test_the_metrics_page_is_read() -> None:
    text = "# TYPE llamacpp:x gauge\nllamacpp:prompt_tokens_total 5\nllamacpp:tokens_predicted_total 1.2e+01\n"
    metrics = llama_json.metrics_of(text)
    assert (metrics.prompt_tokens, metrics.completion_tokens) == (5, 12)


def test_options_set_fields_of_model_options_or_are_passed_on() -> None:
    spec = ModelSpec(
        name=MODEL,
        backend="process:x",
        source="a/b",
        cache_type="q8_0",
        options={"Type": "T", "EnforceEager": "true", "CFGScale": "1.5", "SwapSpace": "3", "other": "v", "ours": "1"},
    )
    options = model_options(spec, "/models/a/b", gpu=True, ours=frozenset({"ours"}))
    assert (options.Type, options.EnforceEager, options.CFGScale, options.SwapSpace) == ("T", True, 1.5, 3)
    assert list(options.Options) == ["other:v"]
    assert (options.Model, options.ModelFile, options.ModelPath) == ("m", "/models/a/b", "/models/a")
    assert options.NGPULayers > 100
    assert options.CacheTypeKey == options.CacheTypeValue == "q8_0"


@pytest.mark.parametrize("options", [{"SwapSpace": "x"}, {"EnforceEager": "maybe"}, {"LoraAdapters": "a"}])
def test_an_option_that_does_not_fit_its_field_is_named(options: dict[str, str]) -> None:
    spec = ModelSpec(name=MODEL, backend="process:x", source="", options=options)
    with pytest.raises(LoadFailed, match=next(iter(options))):
        model_options(spec, "", gpu=False, ours=frozenset())


def test_unset_sampling_is_spelled_out_for_a_protocol_that_cannot_say_unset() -> None:
    options = predict_options(GenerateCall(prompt="p"), "m")
    assert (round(options.Temperature, 3), round(options.TopP, 3), options.TopK) == (0.8, 0.95, 40)
    greedy = predict_options(GenerateCall(prompt="p", sampling=Sampling(temperature=0.0)), "m")
    assert greedy.Temperature == 0
    assert greedy.ModelIdentity == "m"


def test_text_that_is_cut_inside_a_character_is_put_together() -> None:
    reader = ReplyReader(None)
    pieces = [reader.piece(backend_pb2.Reply(message=bytes([byte]))) for byte in "aé".encode()]
    assert [p.text if p else None for p in pieces] == ["a", None, "é"]
    assert reader.end().text == ""


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    reader = ReplyReader(None)
    assert reader.piece(backend_pb2.Reply(message=b"\xc3")) is None
    assert reader.end().text == "\ufffd"


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"content": 5}', b'{"content": [{"token": "a"}]}', b"\xff"])
def test_logprobs_of_another_kind_are_none(raw: bytes) -> None:
    assert ReplyReader(None).piece(backend_pb2.Reply(logprobs=raw)) is None


def test_a_processor_without_the_needed_instructions_is_named() -> None:
    check_cpu_flags("flags\t\t: fpu avx2 fma f16c bmi2 sse\n", "x86_64")
    check_cpu_flags("", "x86_64")
    check_cpu_flags("flags : none\n", "aarch64")
    with pytest.raises(EngineUnavailable, match="lacks avx2, bmi2"):
        check_cpu_flags("flags\t\t: fpu fma f16c\n", "x86_64")
