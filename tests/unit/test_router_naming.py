"""Which model a call is for."""

import pytest

from localmesh.core.errors import InvalidRequest, MeshError, MethodUnknown, ModelNotNamed
from localmesh.router.naming import model_of
from localmesh.v1 import inference_service_pb2 as pb

EMBED = "/localmesh.v1.InferenceService/Embed"
TINY = pb.EmbedRequest(model="tiny", inputs=["x"]).SerializeToString()
NONE = pb.EmbedRequest(inputs=["x"]).SerializeToString()


@pytest.mark.parametrize(
    ("method", "metadata", "message"),
    [
        (EMBED, "tiny", NONE),
        (EMBED, "", TINY),
        (EMBED, "tiny", TINY),
        (EMBED, "tiny", b""),
        ("/backend.Backend/Predict", "tiny", b"\x0a\x05other"),
    ],
)
def test_the_model_is_named_by_metadata_or_by_a_typed_request(method: str, metadata: str, message: bytes) -> None:
    """F55."""
    assert model_of(method, metadata, message) == "tiny"


@pytest.mark.parametrize(
    ("method", "metadata", "message", "error", "said"),
    [
        (EMBED, "other", TINY, InvalidRequest, "'other'.*'tiny'"),
        (EMBED, "", NONE, ModelNotNamed, "localmesh-model.*field 'model'"),
        ("/backend.Backend/Predict", "", TINY, ModelNotNamed, "localmesh-model"),
        (EMBED, "no/slash", b"", InvalidRequest, "not a model name"),
        ("/localmesh.v1.RouterService/Nothing", "", b"", MethodUnknown, "no method"),
    ],
)
def test_a_call_that_names_no_model_or_two_is_told_what_to_do(
    method: str, metadata: str, message: bytes, error: type[MeshError], said: str
) -> None:
    with pytest.raises(error, match=said):
        model_of(method, metadata, message)
