"""A replica of a real model, asked over gRPC: everything that InferenceService promises."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from localmesh.rpc.errors import from_rpc_error
from localmesh.v1 import inference_service_pb2 as pb
from localmesh.v1.inference_service_pb2_grpc import InferenceServiceStub

WEATHER = pb.Tool(name="get_weather", description="Get the weather in a city.")
WEATHER.parameters.update({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]})
SCHEMA = (
    '{"type": "object", "properties": {"n": {"type": "integer"}, "word": {"enum": ["yes", "no"]}},'
    ' "required": ["n", "word"]}'
)


def greedy(**fields: Any) -> pb.SamplingOptions:
    return pb.SamplingOptions(temperature=0, **fields)


def user(text: str) -> list[pb.ChatMessage]:
    return [pb.ChatMessage(role=pb.ROLE_USER, content=text)]


@pytest.fixture
async def stub(tiny: Any) -> AsyncIterator[Any]:
    async with tiny.channel() as channel:
        yield InferenceServiceStub(channel)


async def refused(call: Any) -> Any:
    """Return the MeshError that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_generate_continues_a_text_and_says_what_it_cost(stub: Any) -> None:
    answer = await stub.Generate(pb.GenerateRequest(prompt="The import statement", sampling=greedy(max_tokens=8)))
    assert answer.text
    assert answer.finish_reason == pb.FINISH_REASON_LENGTH
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 8)
    assert answer.timings.completion.ToNanoseconds() > 0
    assert not answer.logprobs


async def test_a_stream_has_the_same_text_and_ends_with_reason_usage_and_timings(stub: Any) -> None:
    sampling = greedy(max_tokens=8)
    whole = await stub.Generate(pb.GenerateRequest(prompt="The import statement", sampling=sampling))
    pieces = [
        p async for p in stub.StreamGenerate(pb.StreamGenerateRequest(prompt="The import statement", sampling=sampling))
    ]
    assert "".join(p.text for p in pieces) == whole.text
    assert [p.finish_reason for p in pieces[:-1]] == [pb.FINISH_REASON_UNSPECIFIED] * (len(pieces) - 1)
    assert len(pieces) > 4
    last = pieces[-1]
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert last.usage == whole.usage
    assert last.HasField("timings")


async def test_chat_uses_the_models_own_template(stub: Any) -> None:
    answer = await stub.Chat(pb.ChatRequest(messages=user("What is the capital of France?"), sampling=greedy()))
    assert answer.message.content == "The capital of France is Paris."
    assert answer.message.role == pb.ROLE_ASSISTANT
    assert answer.finish_reason == pb.FINISH_REASON_STOP


async def test_chat_is_streamed_token_by_token(stub: Any) -> None:
    request = pb.StreamChatRequest(messages=user("What is the capital of Japan?"), sampling=greedy())
    pieces = [p async for p in stub.StreamChat(request)]
    assert "".join(p.content for p in pieces) == "The capital of Japan is Tokyo."
    assert len(pieces) > 5


async def test_the_model_calls_a_tool_with_its_arguments(stub: Any) -> None:
    request = pb.ChatRequest(messages=user("What is the weather in Paris?"), tools=[WEATHER], sampling=greedy())
    answer = await stub.Chat(request)
    assert answer.finish_reason == pb.FINISH_REASON_TOOL_CALLS
    [call] = answer.message.tool_calls
    assert call.name == "get_weather"
    assert json.loads(call.arguments) == {"city": "Paris"}
    assert call.id


async def test_a_tool_call_is_streamed_in_pieces_that_join_to_it(stub: Any) -> None:
    request = pb.StreamChatRequest(messages=user("What is the weather in Oslo?"), tools=[WEATHER], sampling=greedy())
    pieces = [p async for p in stub.StreamChat(request)]
    deltas = [d for p in pieces for d in p.tool_calls]
    assert len(deltas) > 1
    assert {d.index for d in deltas} == {0}
    assert [d.name for d in deltas if d.name] == ["get_weather"]
    assert len([d.id for d in deltas if d.id]) == 1
    assert json.loads("".join(d.arguments for d in deltas)) == {"city": "Oslo"}
    assert pieces[-1].finish_reason == pb.FINISH_REASON_TOOL_CALLS


async def test_a_tools_result_goes_back_into_the_conversation(stub: Any) -> None:
    call = pb.ToolCall(id="1", name="get_weather", arguments='{"city": "Rome"}')
    messages = [
        *user("What is the weather in Rome?"),
        pb.ChatMessage(role=pb.ROLE_ASSISTANT, tool_calls=[call]),
        pb.ChatMessage(role=pb.ROLE_TOOL, tool_call_id="1", content='{"sky": "clear"}'),
    ]
    answer = await stub.Chat(pb.ChatRequest(messages=messages, tools=[WEATHER], sampling=greedy(max_tokens=5)))
    assert answer.usage.prompt_tokens > 100


async def test_tool_choice_none_makes_no_call(stub: Any) -> None:
    request = pb.ChatRequest(
        messages=user("What is the weather in Paris?"),
        tools=[WEATHER],
        tool_choice=pb.TOOL_CHOICE_NONE,
        sampling=greedy(max_tokens=20),
    )
    assert not (await stub.Chat(request)).message.tool_calls


async def test_a_json_schema_binds_a_continued_text(stub: Any) -> None:
    sampling = greedy(json_schema=SCHEMA, max_tokens=80)
    answer = await stub.Generate(pb.GenerateRequest(prompt="An object:", sampling=sampling))
    value = json.loads(answer.text)
    assert set(value) == {"n", "word"}
    assert isinstance(value["n"], int)
    assert value["word"] in ("yes", "no")


SCHEMAS: list[Any] = [
    {"type": "integer"},
    {"type": ["null", "boolean"]},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 1},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": 'a "quoted"\n\u00e9 word'}]},
    {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}, "c": {"const": 1}}},
    {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}}, "required": ["b"]},
    {"anyOf": [{"const": "x"}, {"type": "object", "required": ["k"], "additionalProperties": {"type": "null"}}]},
    {
        "$ref": "#/$defs/list",
        "$defs": {
            "list": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/list"}, "maxItems": 1}]}
        },
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: json.dumps(s)[:40])
async def test_llama_cpp_takes_the_grammar_of_every_kind_of_schema(stub: Any, schema: Any) -> None:
    sampling = pb.SamplingOptions(json_schema=json.dumps(schema), max_tokens=120, seed=3)
    answer = await stub.Generate(pb.GenerateRequest(prompt="JSON:", sampling=sampling))
    assert answer.finish_reason == pb.FINISH_REASON_STOP
    value = json.loads(answer.text)
    kinds = {"integer": int, "string": str, "array": list, "object": dict}
    if isinstance(schema.get("type"), str):
        assert isinstance(value, kinds[schema["type"]])


async def test_a_json_schema_binds_a_chat(stub: Any) -> None:
    answer = await stub.Chat(pb.ChatRequest(messages=user("ping"), sampling=greedy(json_schema=SCHEMA, max_tokens=200)))
    value = json.loads(answer.message.content)
    assert value["word"] in ("yes", "no")


async def test_a_grammar_binds_the_text(stub: Any) -> None:
    sampling = pb.SamplingOptions(grammar='root ::= "left" | "right"', seed=1)
    answer = await stub.Generate(pb.GenerateRequest(prompt="Turn", sampling=sampling))
    assert answer.text in ("left", "right")


async def test_logprobs_come_with_the_likeliest_alternatives_first(stub: Any) -> None:
    sampling = greedy(max_tokens=4, logprobs=3)
    answer = await stub.Generate(pb.GenerateRequest(prompt="The import statement", sampling=sampling))
    assert "".join(entry.token for entry in answer.logprobs) == answer.text
    for entry in answer.logprobs:
        ordered = [a.logprob for a in entry.alternatives]
        assert len(ordered) == 3
        assert ordered == sorted(ordered, reverse=True)
        assert entry.alternatives[0].token == entry.token
        assert entry.logprob <= 0


async def test_logprobs_without_alternatives(stub: Any) -> None:
    answer = await stub.Chat(pb.ChatRequest(messages=user("ping"), sampling=greedy(logprobs=0)))
    assert "".join(entry.token for entry in answer.logprobs) == "pong"
    assert not any(entry.alternatives for entry in answer.logprobs)


async def test_the_text_ends_before_a_stop_string(stub: Any) -> None:
    free = await stub.Generate(pb.GenerateRequest(prompt="The import statement", sampling=greedy(max_tokens=30)))
    word = free.text.split()[3]
    answer = await stub.Generate(
        pb.GenerateRequest(prompt="The import statement", sampling=greedy(max_tokens=30, stop=[word]))
    )
    assert answer.text == free.text[: free.text.index(word)]
    assert answer.finish_reason == pb.FINISH_REASON_STOP


async def test_the_same_seed_gives_the_same_text_and_another_one_another(stub: Any) -> None:
    async def text(seed: int) -> str:
        sampling = pb.SamplingOptions(seed=seed, temperature=1.5, max_tokens=30)
        return str((await stub.Generate(pb.GenerateRequest(prompt="The", sampling=sampling))).text)

    assert await text(7) == await text(7)
    assert len({await text(seed) for seed in (1, 2, -1)}) > 1


async def test_tokens_and_text_turn_into_each_other(stub: Any) -> None:
    text = "The import statement: naïve, 日本."
    tokens = (await stub.Tokenize(pb.TokenizeRequest(text=text))).tokens
    assert (await stub.Detokenize(pb.DetokenizeRequest(tokens=tokens))).text == text
    assert not (await stub.Tokenize(pb.TokenizeRequest(text=""))).tokens


async def test_a_score_is_what_generating_the_same_text_reports(stub: Any) -> None:
    prompt = "The import statement"
    made = await stub.Generate(pb.GenerateRequest(prompt=prompt, sampling=greedy(max_tokens=4, logprobs=0)))
    scored = await stub.Score(pb.ScoreRequest(prompt=prompt, candidates=[made.text, " xyzzy"]))
    assert scored.candidates[0].tokens == 4
    assert scored.candidates[0].logprob == pytest.approx(sum(e.logprob for e in made.logprobs), abs=1e-3)
    assert scored.candidates[1].logprob < scored.candidates[0].logprob


async def test_an_oversize_prompt_is_refused_with_both_counts(stub: Any) -> None:
    error = await refused(stub.Generate(pb.GenerateRequest(prompt="hello " * 2000)))
    assert error.reason == "PROMPT_TOO_LONG"
    assert int(error.metadata["prompt_tokens"]) > int(error.metadata["context_tokens"]) == 512
    error = await refused(stub.Chat(pb.ChatRequest(messages=user("hello " * 2000))))
    assert error.reason == "PROMPT_TOO_LONG"


@pytest.mark.parametrize(
    ("method", "request_"),
    [("Embed", pb.EmbedRequest(inputs=["a"])), ("Rerank", pb.RerankRequest(query="a", documents=["b"]))],
)
async def test_what_the_model_cannot_do_is_said_with_the_way_out(stub: Any, method: str, request_: Any) -> None:
    error = await refused(getattr(stub, method)(request_))
    assert error.reason == "CAPABILITY_UNSUPPORTED"
    assert error.metadata == {"model": "tiny", "capability": method.lower()}
    assert "tiny" in error.message


INVALID: list[tuple[str, Any, str]] = [
    ("Generate", pb.GenerateRequest(), "prompt"),
    ("Generate", pb.GenerateRequest(prompt="x", sampling=pb.SamplingOptions(temperature=-1)), "sampling.temperature"),
    (
        "Generate",
        pb.GenerateRequest(prompt="x", sampling=pb.SamplingOptions(temperature=float("nan"))),
        "sampling.temperature",
    ),
    ("Generate", pb.GenerateRequest(prompt="x", sampling=pb.SamplingOptions(max_tokens=0)), "sampling.max_tokens"),
    ("Generate", pb.GenerateRequest(prompt="x", sampling=pb.SamplingOptions(logprobs=21)), "sampling.logprobs"),
    ("Generate", pb.GenerateRequest(prompt="x", sampling=pb.SamplingOptions(stop=[""])), "sampling.stop"),
    ("Generate", pb.GenerateRequest(prompt="x", sampling=pb.SamplingOptions(grammar="root ::= (")), "sampling.grammar"),
    (
        "Generate",
        pb.GenerateRequest(prompt="x", sampling=pb.SamplingOptions(grammar="root ::= " + "(" * 300_000)),
        "sampling.grammar",
    ),
    (
        "Generate",
        pb.GenerateRequest(prompt="x", sampling=pb.SamplingOptions(json_schema="{")),
        "sampling.json_schema",
    ),
    (
        "Generate",
        pb.GenerateRequest(prompt="x", sampling=pb.SamplingOptions(json_schema='{"type": "nonsense"}')),
        "sampling.json_schema",
    ),
    (
        "Chat",
        pb.ChatRequest(messages=user("x"), sampling=pb.SamplingOptions(json_schema='{"type": "nonsense"}')),
        "sampling.json_schema",
    ),
    (
        "Generate",
        pb.GenerateRequest(
            prompt="x", sampling=pb.SamplingOptions(json_schema='{"items": ' * 5000 + "{}" + "}" * 5000)
        ),
        "sampling.json_schema",
    ),
    ("Chat", pb.ChatRequest(), "messages"),
    ("Chat", pb.ChatRequest(messages=[pb.ChatMessage(content="x")]), "messages[0].role"),
    (
        "Chat",
        pb.ChatRequest(
            messages=[
                *user("x"),
                pb.ChatMessage(role=pb.ROLE_ASSISTANT, tool_calls=[pb.ToolCall(name="f", arguments="[" * 100_000)]),
            ]
        ),
        "messages[1].tool_calls[0].arguments",
    ),
    ("Chat", pb.ChatRequest(messages=user("x"), tools=[pb.Tool()]), "tools[0].name"),
    ("Chat", pb.ChatRequest(messages=user("x"), tool_choice=pb.TOOL_CHOICE_REQUIRED), "tool_choice"),
    ("Detokenize", pb.DetokenizeRequest(), "tokens"),
    ("Detokenize", pb.DetokenizeRequest(tokens=[1024]), "tokens"),
    ("Detokenize", pb.DetokenizeRequest(tokens=[-1]), "tokens"),
    ("Score", pb.ScoreRequest(prompt="x"), "candidates"),
    ("Score", pb.ScoreRequest(prompt="x", candidates=[""]), "candidates[0]"),
]


@pytest.mark.parametrize(("method", "request_", "field"), INVALID, ids=lambda v: v if isinstance(v, str) else "")
async def test_a_bad_request_is_refused_with_the_field_named(stub: Any, method: str, request_: Any, field: str) -> None:
    error = await refused(getattr(stub, method)(request_))
    assert (error.reason, error.metadata.get("field")) == ("INVALID_REQUEST", field)
    assert (await stub.Tokenize(pb.TokenizeRequest(text="alive"))).tokens


async def test_bytes_that_are_no_message_are_refused_and_nothing_breaks(tiny: Any) -> None:
    async with tiny.channel() as channel:
        for junk in (b"\xff" * 50, b"\x0a\xff\xff\xff\xff\x0f", b"\x12\x02\xc3\x28"):
            for service in ("localmesh.v1.InferenceService/Generate", "backend.Backend/Predict"):
                error = await refused(channel.unary_unary(f"/{service}")(junk))
                assert error.reason == "INVALID_REQUEST"
        assert (await InferenceServiceStub(channel).Tokenize(pb.TokenizeRequest(text="alive"))).tokens


async def test_bytes_that_are_no_http2_leave_the_replica_up(tiny: Any, stub: Any) -> None:
    host, port = tiny.endpoint.rsplit(":", 1)
    for junk in (b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 8, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(junk)
        writer.write_eof()
        async with asyncio.timeout(30):
            while await reader.read(4096):
                pass
        writer.close()
    assert (await stub.Tokenize(pb.TokenizeRequest(text="alive"))).tokens


async def test_who_served_is_told_in_the_trailers_also_of_errors(stub: Any) -> None:
    """F25."""
    expected = {("localmesh-served-by-node", "n1"), ("localmesh-served-by-replica", "tiny/n1/0")}
    call = stub.Tokenize(pb.TokenizeRequest(text="x"))
    await call
    assert expected <= {tuple(pair) for pair in await call.trailing_metadata()}
    stream = stub.StreamChat(pb.StreamChatRequest(messages=user("ping")))
    assert [p async for p in stream]
    assert expected <= {tuple(pair) for pair in await stream.trailing_metadata()}
    call = stub.Generate(pb.GenerateRequest())
    await refused(call)
    assert expected <= {tuple(pair) for pair in await call.trailing_metadata()}


async def test_a_model_with_embeddings_on_embeds_and_says_why_it_does_not_generate(
    start_replica: Callable[..., Any], spec: Callable[..., Any]
) -> None:
    replica = start_replica(spec(embeddings=True)).ready()
    async with replica.channel() as channel:
        stub = InferenceServiceStub(channel)
        answer = await stub.Embed(pb.EmbedRequest(inputs=["a cat", "a dog"]))
        assert [len(e.values) for e in answer.embeddings] == [192, 192]
        assert sum(v * v for v in answer.embeddings[0].values) == pytest.approx(1.0, abs=1e-3)
        assert answer.usage.prompt_tokens > 0
        error = await refused(stub.Generate(pb.GenerateRequest(prompt="x")))
        assert error.reason == "CAPABILITY_UNSUPPORTED"
        error = await refused(stub.Embed(pb.EmbedRequest(inputs=["hello " * 2000])))
        assert error.reason == "PROMPT_TOO_LONG"
        error = await refused(stub.Embed(pb.EmbedRequest(inputs=["a", ""])))
        assert error.metadata["field"] == "inputs[1]"
