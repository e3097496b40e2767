"""What is too long is known before anything is tokenized."""

from types import MappingProxyType

import pytest

from localmesh.core.errors import InvalidRequest, PromptTooLong
from localmesh.core.gguf import Header, SkippedArray, Value
from localmesh.replica.engines.text_limits import MOST_TEXT, MOST_TOKENS, TextLimits, check_count, check_text


def header(tokens: Value, model: str = "gpt2") -> Header:
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.model": model}
    return Header(version=3, metadata=MappingProxyType(metadata), tensor_count=0, weights_bytes=0, repacked=False)


def test_a_prompt_is_refused_from_the_length_on_that_no_tokens_of_the_context_reach() -> None:
    limits = TextLimits.of(header(SkippedArray(50_000, longest=128)), 100)
    limits.check("x" * 100 * 128)
    with pytest.raises(PromptTooLong) as refused:
        limits.check("x" * 100 * 128 + "x")
    assert refused.value.metadata == {"prompt_tokens": "101", "context_tokens": "100"}


def test_all_parts_of_a_prompt_count() -> None:
    limits = TextLimits.of(header(("a", "b" * 40)), 10)
    limits.check("x" * 200, "y" * 200)
    with pytest.raises(PromptTooLong):
        limits.check("x" * 200, "y" * 201)


@pytest.mark.parametrize("model", ["bert", "t5", "unheard-of"])
def test_a_tokenizer_that_drops_text_is_given_more(model: str) -> None:
    limits = TextLimits.of(header(("word",), model), 10)
    limits.check(" " * 10 * 1024)
    with pytest.raises(PromptTooLong):
        limits.check(" " * (10 * 1024 + 1))


def test_a_file_that_does_not_tell_its_tokens_has_limits_all_the_same() -> None:
    assert TextLimits.of(header(()), 10).bytes_per_token >= 1024


def test_what_is_tokenized_for_its_own_sake_is_limited() -> None:
    check_text("x" * MOST_TEXT)
    with pytest.raises(InvalidRequest, match="Split it"):
        check_text("x" * (MOST_TEXT + 1))
    check_count((1,) * MOST_TOKENS)
    with pytest.raises(InvalidRequest, match="Split it"):
        check_count((1,) * (MOST_TOKENS + 1))
