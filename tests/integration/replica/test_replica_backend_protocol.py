"""backend.Backend on an engine of ours: a client of LocalAI's finds what it expects. F54."""

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from localmesh.rpc.errors import from_rpc_error
from localmesh.thirdparty import backend_pb2 as pb
from localmesh.thirdparty.backend_pb2_grpc import BackendStub

TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "Get the weather in a city.",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            },
        }
    ]
)


@pytest.fixture
async def stub(tiny: Any) -> AsyncIterator[Any]:
    async with tiny.channel() as channel:
        yield BackendStub(channel)


def chat(text: str, **fields: Any) -> pb.PredictOptions:
    return pb.PredictOptions(UseTokenizerTemplate=True, Messages=[pb.Message(role="user", content=text)], **fields)


async def failure_of(call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_health_is_ok(stub: Any) -> None:
    assert (await stub.Health(pb.HealthMessage())).message == b"OK"


async def test_predict_gives_text_and_counts(stub: Any) -> None:
    reply = await stub.Predict(pb.PredictOptions(Prompt="The import statement", Tokens=5))
    assert reply.message
    assert (reply.tokens, reply.prompt_tokens) == (5, 4)
    assert reply.timing_token_generation > 0
    assert not reply.chat_deltas


async def test_a_chat_by_the_models_template_has_text_and_deltas(stub: Any) -> None:
    reply = await stub.Predict(chat("What is the capital of France?"))
    assert reply.message == b"The capital of France is Paris."
    assert reply.chat_deltas[0].content == "The capital of France is Paris."


async def test_a_stream_has_the_counts_in_its_last_message(stub: Any) -> None:
    replies = [r async for r in stub.PredictStream(chat("What is the capital of France?"))]
    assert b"".join(r.message for r in replies) == b"The capital of France is Paris."
    assert "".join(d.content for r in replies for d in r.chat_deltas) == "The capital of France is Paris."
    assert replies[-1].tokens > 5
    assert not any(r.tokens for r in replies[:-1])


@pytest.mark.parametrize("choice", ["", "auto", '{"type": "function", "function": {"name": "get_weather"}}'])
async def test_tool_calls_come_as_deltas(stub: Any, choice: str) -> None:
    reply = await stub.Predict(chat("What is the weather in Paris?", Tools=TOOLS, ToolChoice=choice))
    [call] = reply.chat_deltas[0].tool_calls
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})


async def test_a_grammar_and_logprobs(stub: Any) -> None:
    reply = await stub.Predict(pb.PredictOptions(Prompt="x", Grammar='root ::= "yes"', Logprobs=1, TopLogprobs=2))
    assert reply.message == b"yes"
    content = json.loads(reply.logprobs)["content"]
    assert "".join(entry["token"] for entry in content) == "yes"
    assert len(content[0]["top_logprobs"]) == 2


async def test_tokens_and_text(stub: Any) -> None:
    tokens = await stub.TokenizeString(pb.PredictOptions(Prompt="import this"))
    assert tokens.length == len(tokens.tokens) > 1
    assert (await stub.Detokenize(pb.DetokenizeRequest(tokens=tokens.tokens))).content == "import this"


async def test_a_score_has_tokens_and_a_normalised_value(stub: Any) -> None:
    answer = await stub.Score(
        pb.ScoreRequest(prompt="The", candidates=[" import"], include_token_logprobs=True, length_normalize=True)
    )
    [candidate] = answer.candidates
    assert candidate.num_tokens == len(candidate.tokens)
    assert candidate.log_prob == pytest.approx(sum(t.log_prob for t in candidate.tokens))
    assert candidate.length_normalized_log_prob == pytest.approx(candidate.log_prob / candidate.num_tokens)


async def test_status_and_metrics_and_metadata(stub: Any) -> None:
    status = await stub.Status(pb.HealthMessage())
    assert status.state == pb.StatusResponse.READY
    assert status.memory.total > 20 << 20
    await stub.Predict(pb.PredictOptions(Prompt="The", Tokens=3))
    assert (await stub.GetMetrics(pb.MetricsRequest())).tokens_generated >= 3
    assert not (await stub.ModelMetadata(pb.ModelOptions())).supports_thinking


async def test_a_request_for_another_model_is_told_so_in_that_protocols_words(stub: Any) -> None:
    call = stub.Predict(pb.PredictOptions(Prompt="x", ModelIdentity="other"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "model identity mismatch: loaded 'tiny', requested 'other'"
    assert (await stub.TokenizeString(pb.PredictOptions(Prompt="x", ModelIdentity="tiny"))).length


async def test_loading_the_model_again_succeeds_and_another_one_does_not(stub: Any) -> None:
    for name in ("tiny", "tiny.gguf"):
        assert (await stub.LoadModel(pb.ModelOptions(Model=name))).success
    answer = await stub.LoadModel(pb.ModelOptions(Model="other"))
    assert not answer.success
    assert "'tiny'" in answer.message


@pytest.mark.parametrize(
    ("method", "request_", "capability"),
    [
        ("Free", pb.HealthMessage(), "Free"),
        ("Embedding", pb.PredictOptions(Embeddings="x"), "embed"),
        ("Rerank", pb.RerankRequest(query="x", documents=["y"]), "rerank"),
        ("TokenClassify", pb.TokenClassifyRequest(text="x"), "TokenClassify"),
        ("Predict", pb.PredictOptions(Prompt="x", Images=["aGk="]), "images"),
    ],
)
async def test_what_it_cannot_do_is_unimplemented(stub: Any, method: str, request_: Any, capability: str) -> None:
    error = await failure_of(getattr(stub, method)(request_))
    assert (error.reason, error.metadata["capability"]) == ("CAPABILITY_UNSUPPORTED", capability)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.PredictOptions(), "Prompt"),
        (pb.PredictOptions(Prompt="x", Temperature=-1), "Temperature"),
        (pb.PredictOptions(Prompt="x", TopP=7), "TopP"),
        (pb.PredictOptions(Prompt="x", Grammar="root ::= ("), "sampling.grammar"),
        (chat("x", Tools="{"), "Tools"),
        (chat("x", Tools="[1]"), "Tools"),
        (chat("x", Tools='[{"function": {}}]'), "Tools"),
        (chat("x", Tools=TOOLS, ToolChoice="sometimes"), "ToolChoice"),
        (chat("x", Tools=TOOLS, ToolChoice='{"function": 7}'), "ToolChoice"),
        (pb.PredictOptions(UseTokenizerTemplate=True, Messages=[pb.Message(role="")]), "Messages[0].role"),
        (
            pb.PredictOptions(
                UseTokenizerTemplate=True,
                Messages=[pb.Message(role="assistant", tool_calls='[{"function": {"name": "f", "arguments": "[1]"}}]')],
            ),
            "Messages[0].tool_calls",
        ),
    ],
)
async def test_a_bad_request_is_refused_with_the_field_named(stub: Any, request_: Any, field: str) -> None:
    error = await failure_of(stub.Predict(request_))
    assert (error.reason, error.metadata["field"]) == ("INVALID_REQUEST", field)
