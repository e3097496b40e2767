"""How much text is looked at: tokenizing costs a second and 50 MiB for each MiB, and cannot be cancelled.

Pure. What cannot fit into the context by its sheer length is refused before a tokenizer sees it.
"""

from dataclasses import dataclass

from localmesh.core.errors import InvalidRequest, PromptTooLong
from localmesh.core.gguf import Header, SkippedArray

MOST_TEXT = 4 << 20
"""Characters that are tokenized for their own sake."""
MOST_TOKENS = 1 << 20
"""Tokens that are turned into text for their own sake."""
_LOSSLESS = ("gpt2", "llama")
"""Tokenizers in which each byte of a text belongs to a token. Others may drop whitespace, or take a word for one."""
_SHORTEST = 16
_LOSSY_BYTES = 1024
"""Text for each token of those others, as a limit."""


@dataclass(frozen=True, slots=True)
class TextLimits:
    """What a model's context can hold at most."""

    context_tokens: int
    bytes_per_token: int
    """No token stands for more."""

    @classmethod
    def of(cls, header: Header, context_tokens: int) -> "TextLimits":
        """Return the limits of a model."""
        tokens = header.metadata.get("tokenizer.ggml.tokens")
        longest = 0
        if isinstance(tokens, SkippedArray):
            longest = tokens.longest
        elif isinstance(tokens, tuple):
            longest = max((len(str(token).encode()) for token in tokens), default=0)
        lossless = longest and header.metadata.get("tokenizer.ggml.model") in _LOSSLESS
        return cls(context_tokens, max(longest, _SHORTEST) if lossless else max(longest, _LOSSY_BYTES))

    def check(self, *texts: str) -> None:
        """Check a prompt, in all its parts. One that passes may still be too long: its tokens tell.

        Raises:
            PromptTooLong: It cannot fit, whatever its tokens are.
        """
        size = sum(map(len, texts))  # characters, of which none is less than a byte
        if size > self.context_tokens * self.bytes_per_token:
            least = -(-size // self.bytes_per_token)
            raise PromptTooLong(
                f"the prompt has {size} characters, which are at least {least} tokens; the model's context has"
                f" {self.context_tokens}: shorten the prompt, or raise context_tokens in the model's spec.",
                prompt_tokens=least,
                context_tokens=self.context_tokens,
            )


def check_text(text: str) -> None:
    """Check what is to be tokenized for its own sake.

    Raises:
        InvalidRequest: It is too much at a time.
    """
    if len(text) > MOST_TEXT:
        raise InvalidRequest(
            f"text has {len(text)} characters: at most {MOST_TEXT} are tokenized at a time. Split it.", field="text"
        )


def check_count(tokens: tuple[int, ...]) -> None:
    """Check what is to be turned into text.

    Raises:
        InvalidRequest: It is too much at a time.
    """
    if len(tokens) > MOST_TOKENS:
        raise InvalidRequest(
            f"tokens has {len(tokens)} entries: at most {MOST_TOKENS} are turned into text at a time. Split it.",
            field="tokens",
        )
