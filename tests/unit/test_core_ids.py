"""Names from outside are hostile."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmesh.core.ids import ModelName, NodeName, ReplicaId, model_name, node_name


@pytest.mark.parametrize("text", ["", "-a", ".", "a/b", "a b", "a\n", "ä", "a" * 129, "../x", "a\0"])
def test_bad_model_names_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a model name"):
        model_name(text)


@pytest.mark.parametrize("text", ["", "_a", "a:b", "a/b", "a" * 64, "a\n"])
def test_bad_node_names_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a node name"):
        node_name(text)


@pytest.mark.parametrize("text", ["llama3:8b", "A", "qwen2.5-coder_7b", "a" * 128])
def test_usual_model_names_are_allowed(text: str) -> None:
    assert model_name(text) == text


def test_a_replica_reads_back_as_it_was_written() -> None:
    replica = ReplicaId(ModelName("llama3:8b"), NodeName("box-1"), 2)
    assert ReplicaId.parse(str(replica)) == replica


@given(st.text(max_size=40))
def test_any_text_is_a_replica_or_a_value_error(text: str) -> None:
    try:
        replica = ReplicaId.parse(text)
    except ValueError:
        return
    assert (replica.model, replica.node) == tuple(text.split("/")[:2])
