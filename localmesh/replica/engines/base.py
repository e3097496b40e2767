"""What an engine is: requests and answers in plain values, and the calls that a replica makes.

Engines raise localmesh.core.errors. Whatever an engine yields or returns is complete in itself: no protobuf, no HTTP.
Closing or cancelling a call stops its computing.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, unique
from types import MappingProxyType
from typing import Any, Protocol

from localmesh.core.errors import CapabilityUnsupported
from localmesh.core.ids import ModelName


@unique
class Capability(Enum):
    """What an engine may be able to do."""

    GENERATE = "generate"
    CHAT = "chat"
    EMBED = "embed"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"
    RERANK = "rerank"
    SCORE = "score"


@unique
class Finish(Enum):
    """Why a text ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen; None means the engine's default."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    repeat_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: int | None = None
    """Alternatives to give for each token; None for no log-probabilities at all."""
    json_schema: Any = None
    """A JSON Schema as parsed JSON; None for none."""
    grammar: str = ""
    ignore_end: bool = False
    """Go on after the model ended its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A tool call of an earlier answer."""

    id: str
    name: str
    arguments: str
    """JSON text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a conversation."""

    role: str
    """"system", "user", "assistant" or "tool"."""
    content: str
    reasoning: str = ""
    name: str = ""
    tool_calls: tuple[Call, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """A tool that the model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON Schema of the arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """Continue a text."""

    prompt: str
    sampling: Sampling = field(default_factory=Sampling)
    streamed: bool = True
    """Whether the caller takes pieces as they come; otherwise one piece will do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCall:
    """Answer a conversation."""

    messages: tuple[Message, ...]
    sampling: Sampling = field(default_factory=Sampling)
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: str = "auto"
    """"auto", "none", "required", or the name of the one tool to call after "function:"."""
    streamed: bool = True
    """As for GenerateCall."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A token that could have stood there."""

    token: str
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token, its log-probability, and the likeliest ones at its place."""

    token: str
    logprob: float
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPiece:
    """A piece of a tool call; pieces of one index belong together."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a text ended and what it cost."""

    finish: Finish
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_seconds: float = 0.0
    completion_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The next piece of an answer. Exactly the last one has an end."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[CallPiece, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    end: End | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """Vectors, one for each input in order."""

    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Documents by relevance: (place in the request, score), most relevant first."""

    results: tuple[tuple[int, float], ...]
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Log-probability of a continuation, token by token."""

    tokens: tuple[TokenLogprob, ...]

    @property
    def logprob(self) -> float:
        """Sum over the tokens."""
        return sum(t.logprob for t in self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMetrics:
    """What an engine counts since it was loaded."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens_per_second: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What an engine knows once the model is loaded."""

    capabilities: frozenset[Capability]
    context_tokens: int = 0
    """Tokens of a slot; 0 if the engine does not say."""
    chat_template: str = ""
    missing: Mapping[Capability, str] = field(default_factory=lambda: MappingProxyType({}))
    """Why it cannot do something and what to do about it, where that can be said."""


ReportPhase = Callable[[str, int, int], None]
"""Called with the phase, the bytes done, and the bytes in all (0: not known)."""


class Engine(Protocol):
    """One loaded model. `load` comes first, once; `stop` last. Calls in between run side by side.

    A call for a capability that is not in `loaded.capabilities` is never made.
    """

    @property
    def name(self) -> str:
        """Return the engine's name for messages, e.g. "llama"."""
        ...

    @property
    def loaded(self) -> Loaded:
        """Return what is known after `load`."""
        ...

    async def load(self, report: ReportPhase) -> None:
        """Load the model.

        Raises:
            SourceMissing: The model's file is not there.
            EngineUnavailable: This machine cannot run the engine.
            LoadFailed: The model cannot be loaded; the message has the engine's words.
        """
        ...

    async def lost(self) -> str:
        """Wait until the engine has died by itself, and return why. Engines that live in this process never return."""
        ...

    def generate(self, call: GenerateCall) -> AsyncGenerator[Piece, None]:
        """Continue a text."""
        ...

    def chat(self, call: ChatCall) -> AsyncGenerator[Piece, None]:
        """Answer a conversation."""
        ...

    async def embed(self, inputs: tuple[str | tuple[int, ...], ...]) -> Embeddings:
        """Turn texts, or texts given as tokens, into vectors."""
        ...

    async def tokenize(self, text: str, *, add_special: bool) -> tuple[int, ...]:
        """Split a text into tokens."""
        ...

    async def detokenize(self, tokens: tuple[int, ...]) -> str:
        """Join tokens."""
        ...

    async def rerank(self, query: str, documents: tuple[str, ...], top_n: int) -> Ranking:
        """Order documents by relevance; at most `top_n` (0: all)."""
        ...

    async def score(self, prompt: str, candidates: tuple[str, ...]) -> tuple[Score, ...]:
        """Score each candidate as a continuation of the prompt."""
        ...

    async def metrics(self) -> EngineMetrics:
        """Return what was counted."""
        ...

    async def stop(self) -> None:
        """End the engine and whatever it started. Safe to call at any time, twice too."""
        ...


def require(engine: Engine, model: ModelName, capability: Capability) -> None:
    """Check that the engine can do something.

    Raises:
        CapabilityUnsupported: It cannot.
    """
    loaded = engine.loaded
    if capability in loaded.capabilities:
        return
    why = loaded.missing.get(capability, "")
    message = f"the model {model!r} on the engine {engine.name!r} cannot {capability.value}"
    raise CapabilityUnsupported(f"{message}: {why}" if why else f"{message}.", model=model, capability=capability.value)
