"""Finding the model in a request's bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmesh.router.peek import model_field
from localmesh.v1 import inference_service_pb2 as pb

_REQUESTS = [
    pb.GenerateRequest(model="tiny", prompt="Hello", sampling=pb.SamplingOptions(max_tokens=5, seed=7)),
    pb.StreamGenerateRequest(model="tiny", prompt="x" * 300),
    pb.ChatRequest(model="tiny", messages=[pb.ChatMessage(role=pb.ROLE_USER, content="Hi")]),
    pb.EmbedRequest(model="tiny", inputs=["a", "b"]),
    pb.TokenizeRequest(model="tiny", text="a", add_special=True),
    pb.DetokenizeRequest(model="tiny", tokens=[1, 300, 70000]),
    pb.RerankRequest(model="tiny", query="q", documents=["d"], top_n=1),
    pb.ScoreRequest(model="tiny", prompt="p", candidates=["c"]),
]


@pytest.mark.parametrize("request_", _REQUESTS, ids=lambda r: type(r).__name__)
def test_the_model_of_every_request_is_found(request_: object) -> None:
    assert model_field(request_.SerializeToString()) == "tiny"


def test_the_model_is_found_behind_other_fields() -> None:
    rest = pb.DetokenizeRequest(tokens=[1, 2, 300]).SerializeToString()
    odd = b"\x19" + b"12345678" + b"\x25" + b"1234" + b"\x30\x96\x01"  # fixed64, fixed32 and varint of unknown numbers
    assert model_field(rest + odd + pb.DetokenizeRequest(model="tiny").SerializeToString()) == "tiny"


def test_a_request_without_a_model_has_an_empty_one() -> None:
    assert model_field(pb.EmbedRequest(inputs=["a"]).SerializeToString()) == ""
    assert model_field(b"") == ""


@given(st.binary(max_size=64))
def test_any_bytes_are_read_without_harm(message: bytes) -> None:
    assert isinstance(model_field(message), str)


@given(st.text(max_size=40))
def test_it_agrees_with_the_decoder(name: str) -> None:
    assert model_field(pb.EmbedRequest(model=name, inputs=["x"]).SerializeToString()) == name


def test_a_model_that_claims_more_bytes_than_there_are_is_none() -> None:
    assert model_field(b"\x0a\x7fabc") == ""
