"""The engine for GGUF files: llama.cpp in this process, spoken to over its own server on a private socket."""

import asyncio
import platform
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmesh.core.errors import (
    EngineFailed,
    EngineUnavailable,
    InvalidRequest,
    LoadFailed,
    MeshError,
    SourceMissing,
)
from localmesh.core.gguf import GgufError, Header, effective_context, read_header
from localmesh.core.records import ModelSpec
from localmesh.replica.engines import llama_json
from localmesh.replica.engines.base import (
    Capability,
    ChatCall,
    Embeddings,
    EngineMetrics,
    GenerateCall,
    Loaded,
    Piece,
    Ranking,
    ReportPhase,
    Score,
    TokenLogprob,
)
from localmesh.replica.engines.llama_http import LlamaHttp, LlamaHttpBroken, LlamaHttpError
from localmesh.replica.engines.preflight import check_cpu_flags
from localmesh.replica.engines.stderr_capture import StderrCapture
from localmesh.replica.engines.text_limits import TextLimits, check_count, check_text

_CPUINFO = Path("/proc/cpuinfo")
_STATM = Path("/proc/self/statm")
_PAGE = 4096
_BATCH = 512
_POLL_SECONDS = 0.25
_SPARE_HTTP_THREADS = 8
_POOLINGS = ("mean", "cls", "last", "rank")
_NONE, _RANK = 0, 4
_OPTIONS = {"pooling": _POOLINGS, "kv_unified": ("true", "false"), "repack": ("true", "false")}
_FORCED = 1e9
"""A bias that no other token's score can reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """How a model is loaded."""

    spec: ModelSpec
    model_path: Path
    run_dir: Path
    limit: int
    """Requests that may be sent to the engine at once."""
    gpu: bool = False
    engine: str = llama_json.ENGINE
    """Name for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What the file and the spec come to."""

    header: Header
    slots: int
    context_tokens: int
    pooling: str
    """Empty for a model that generates."""
    options: Mapping[str, str]


class LlamaEngine:
    """llama.cpp with one model. See Engine."""

    def __init__(self, config: LlamaConfig) -> None:
        self._config = config
        self._path = config.model_path
        self._model = config.spec.name
        self._server: Any = None
        self._loaded = Loaded(capabilities=frozenset())
        self._socket = config.run_dir / f"llama-{secrets.token_hex(4)}.sock"
        self._key = secrets.token_hex(16)
        self._http = LlamaHttp(self._socket, self._key)
        self._vocabulary = 0
        self._limits = TextLimits(0, 0)

    @property
    def name(self) -> str:
        """See Engine."""
        return self._config.engine

    @property
    def loaded(self) -> Loaded:
        """See Engine."""
        return self._loaded

    def use_model(self, path: Path) -> None:
        """Take another file than the configuration said. Before `load`."""
        self._path = path

    async def load(self, report: ReportPhase) -> None:
        """See Engine."""
        loop = asyncio.get_running_loop()
        path = self._path
        plan = await loop.run_in_executor(None, self._plan)
        size = path.stat().st_size
        report("loading", 0, size)
        before = _resident_bytes()
        with StderrCapture(self._config.run_dir) as capture:
            done = loop.run_in_executor(None, self._start_server, plan)
            while not done.done():
                await asyncio.wait((done,), timeout=_POLL_SECONDS)
                # the file is mapped: what has become resident has been read
                report("loading", max(0, min(size, _resident_bytes() - before)), size)
            try:
                self._server = done.result()
            except RuntimeError as error:
                raise _load_failed(self._config.spec, capture.text() or str(error)) from None
        self._vocabulary = plan.header.vocabulary
        self._limits = TextLimits.of(plan.header, plan.context_tokens)
        self._loaded = _what_it_can(plan)

    async def lost(self) -> str:
        """See Engine."""
        await asyncio.Event().wait()
        raise AssertionError("an event that nobody sets was set")

    async def stop(self) -> None:
        """See Engine.

        The model stays loaded until the process ends. llama.cpp's destructor joins its threads with the interpreter
        locked; one of them may wait for a connection to be closed that this interpreter has not closed yet.
        """
        self._socket.unlink(missing_ok=True)

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Piece, None]:
        """See Engine."""
        self._limits.check(call.prompt)
        body = llama_json.generate_body(call)
        async with aclosing(self._answer("/v1/completions", body, call, "prompt")) as pieces:
            async for piece in pieces:
                yield piece

    async def chat(self, call: ChatCall) -> AsyncGenerator[Piece, None]:
        """See Engine."""
        self._limits.check(*(message.content for message in call.messages))
        body = llama_json.chat_body(call)
        async with aclosing(self._answer("/v1/chat/completions", body, call, "messages")) as pieces:
            async for piece in pieces:
                yield piece

    async def embed(self, inputs: tuple[str | tuple[int, ...], ...]) -> Embeddings:
        """See Engine."""
        for text in inputs:
            self._limits.check(text if isinstance(text, str) else "")
        body = {"input": [i if isinstance(i, str) else list(i) for i in inputs]}
        answer = await self._call("POST", "/v1/embeddings", body, field="inputs")
        ordered = sorted(answer["data"], key=lambda d: int(d["index"]))
        return Embeddings(
            vectors=tuple(tuple(d["embedding"]) for d in ordered),
            prompt_tokens=int(answer.get("usage", {}).get("prompt_tokens", 0)),
        )

    async def tokenize(self, text: str, *, add_special: bool) -> tuple[int, ...]:
        """See Engine."""
        check_text(text)
        body = {"content": text, "add_special": add_special, "parse_special": True}
        answer = await self._call("POST", "/tokenize", body, field="text")
        return tuple(answer["tokens"])

    async def detokenize(self, tokens: tuple[int, ...]) -> str:
        """See Engine."""
        check_count(tokens)
        self._check_tokens(tokens, "tokens")
        answer = await self._call("POST", "/detokenize", {"tokens": list(tokens)}, field="tokens")
        return str(answer["content"])

    async def rerank(self, query: str, documents: tuple[str, ...], top_n: int) -> Ranking:
        """See Engine."""
        for document in documents:
            self._limits.check(query, document)
        body = {"query": query, "documents": list(documents), "top_n": top_n or len(documents)}
        answer = await self._call("POST", "/v1/rerank", body, field="documents")
        results = sorted(
            ((int(r["index"]), float(r["relevance_score"])) for r in answer["results"]), key=lambda r: -r[1]
        )
        return Ranking(
            results=tuple(results[: top_n or None]),
            prompt_tokens=int(answer.get("usage", {}).get("prompt_tokens", 0)),
        )

    async def score(self, prompt: str, candidates: tuple[str, ...]) -> tuple[Score, ...]:
        """See Engine.

        llama.cpp gives no log-probabilities of a prompt. So each token of a candidate is forced by a bias, one at a
        time, and its log-probability is taken as it was before the bias; the tokens before it are in the slot's cache.
        """
        for candidate in candidates:
            self._limits.check(prompt, candidate)
        start = await self.tokenize(prompt, add_special=True)
        scores = []
        for candidate in candidates:
            whole = await self.tokenize(prompt + candidate, add_special=True)
            rest = whole[len(start) :]
            if whole[: len(start)] != start:  # the candidate's first token would swallow the prompt's last one
                rest = await self.tokenize(candidate, add_special=False)
            scored: list[TokenLogprob] = []
            for position, token in enumerate(rest):
                scored.append(await self._logprob((*start, *rest[:position]), token))
            scores.append(Score(tokens=tuple(scored)))
        return tuple(scores)

    async def metrics(self) -> EngineMetrics:
        """See Engine."""
        return llama_json.metrics_of(str(await self._call("GET", "/metrics", None, field="")))

    async def _logprob(self, before: tuple[int, ...], token: int) -> TokenLogprob:
        body = {
            "prompt": list(before),
            "n_predict": 1,
            "n_probs": 1,
            "temperature": 0.0,
            "logit_bias": [[token, _FORCED]],
            "cache_prompt": True,
        }
        answer = await self._call("POST", "/completion", body, field="prompt")
        entry = answer["completion_probabilities"][0]
        if int(entry["id"]) != token:
            raise EngineFailed("llama.cpp did not take the token that was forced on it.", engine=self.name)
        return TokenLogprob(token=str(entry["token"]), logprob=float(entry["logprob"]))

    async def _answer(
        self, url: str, body: Mapping[str, Any], call: GenerateCall | ChatCall, field: str
    ) -> AsyncGenerator[Piece, None]:
        ending = llama_json.EndBuilder()
        sampling = call.sampling
        try:
            async with aclosing(self._events(url, body, streamed=call.streamed)) as events:
                async for event in events:
                    ending.look_at(event)
                    piece = llama_json.piece_of(event, alternatives=sampling.logprobs or 0)
                    if piece is not None:
                        yield piece
        except LlamaHttpError as error:
            raise llama_json.error_of(error, self._model, field=field, sampling=sampling) from error
        except LlamaHttpBroken as error:
            raise self._broken(error) from error
        yield Piece(end=ending.end())

    async def _events(
        self, url: str, body: Mapping[str, Any], *, streamed: bool
    ) -> AsyncGenerator[Mapping[str, Any], None]:
        """Give the events of an answer; a whole answer is one event."""
        if not streamed:
            yield await self._http.call("POST", url, body)
            return
        request = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with aclosing(self._http.stream(url, request)) as events:
            async for event in events:
                yield event

    async def _call(self, method: str, url: str, body: Mapping[str, Any] | None, *, field: str) -> Any:
        try:
            return await self._http.call(method, url, body)
        except LlamaHttpError as error:
            raise llama_json.error_of(error, self._model, field=field) from error
        except LlamaHttpBroken as error:
            raise self._broken(error) from error

    def _broken(self, error: LlamaHttpBroken) -> MeshError:
        return EngineFailed(f"llama.cpp broke off: {error}", engine=self.name)

    def _check_tokens(self, tokens: tuple[int, ...], field: str) -> None:
        for token in tokens:
            if token < 0 or (self._vocabulary and token >= self._vocabulary):
                raise InvalidRequest(f"{token} is no token of the model: it has {self._vocabulary}.", field=field)

    def _plan(self) -> _Plan:
        """Check everything that can be checked before llama.cpp touches the file. Runs in a thread."""
        spec, path = self._config.spec, self._path
        check_cpu_flags(_CPUINFO.read_text() if _CPUINFO.exists() else "", platform.machine())
        if not path.is_file():
            raise SourceMissing(f"there is no file {path}: put the model there.", model=spec.name, source=spec.source)
        try:
            with path.open("rb") as stream:
                header = read_header(stream)
        except GgufError as error:
            raise LoadFailed(f"{path.name} cannot be loaded: corrupt GGUF: {error}", model=spec.name) from error
        except OSError as error:
            raise LoadFailed(f"{path} cannot be read: {error.strerror}", model=spec.name) from error
        options = _options(spec)
        context = effective_context(header, spec.context_tokens)
        return _Plan(
            header=header,
            slots=max(1, spec.slots),
            context_tokens=context,
            pooling=_pooling(spec, header, options),
            options=options,
        )

    def _start_server(self, plan: _Plan) -> Any:
        """Start llama.cpp's server and wait until the model is loaded. Runs in a thread; the GIL is released."""
        try:
            import xllamacpp
        except ImportError as error:
            raise EngineUnavailable(
                f"llama.cpp cannot be used here: {error}. Install it with: pip install 'localmesh[engines]'"
                " (on Debian it needs libgomp1, too).",
                engine=self.name,
            ) from error
        if self._config.gpu and not _has_gpu(xllamacpp):
            raise EngineUnavailable(
                "the installed xllamacpp sees no GPU: pip's wheel is for CPUs only. Install its wheel for your GPU"
                " (CUDA, ROCm or Vulkan), or set device_kind: cpu.",
                engine=self.name,
            )
        return xllamacpp.Server(self._parameters(xllamacpp, plan))

    def _parameters(self, xllamacpp: Any, plan: _Plan) -> Any:
        spec = self._config.spec
        p = xllamacpp.CommonParams()
        p.model.path = str(self._path)
        p.n_parallel = plan.slots
        p.n_ctx = plan.context_tokens * plan.slots
        p.n_batch = p.n_ubatch = _BATCH
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = max(1, spec.threads)
        p.n_threads_http = self._config.limit + _SPARE_HTTP_THREADS  # each request holds one until it ends
        p.n_gpu_layers = spec.gpu_layers if spec.gpu_layers is not None else (-1 if self._config.gpu else 0)
        p.fit_params = False  # the scheduler has decided; llama.cpp must not shrink the context to fit
        p.cache_ram_mib = 0  # by default it would keep up to 8 GiB of old prompts
        p.kv_unified = plan.options.get("kv_unified") == "true"
        p.no_extra_bufts = plan.options.get("repack") == "false"
        p.endpoint_metrics = True
        p.verbosity = 2
        p.ui = False
        p.hostnames = [str(self._socket)]
        p.api_keys = [self._key]
        if spec.cache_type:
            p.cache_type_k = p.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{spec.cache_type.upper()}")
        if plan.pooling:
            p.embedding = True
            p.kv_unified = True
            p.n_batch = p.n_ubatch = max(_BATCH, plan.context_tokens)  # an input is embedded in one go
            if plan.pooling != "default":
                p.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{plan.pooling.upper()}")
        return p


def _options(spec: ModelSpec) -> Mapping[str, str]:
    for key, value in spec.options.items():
        if key not in _OPTIONS:
            raise LoadFailed(f"unknown option {key!r}: llama knows {', '.join(_OPTIONS)}.", model=spec.name)
        if value not in _OPTIONS[key]:
            raise LoadFailed(f"option {key}: {value!r} is none of {', '.join(_OPTIONS[key])}.", model=spec.name)
    if spec.cache_type not in ("", "f16", "q8_0", "q4_0"):
        raise LoadFailed(f"cache_type {spec.cache_type!r} is none of f16, q8_0, q4_0.", model=spec.name)
    return spec.options


def _pooling(spec: ModelSpec, header: Header, options: Mapping[str, str]) -> str:
    """Return how the model pools: empty if it generates, "default" if its file says how."""
    if chosen := options.get("pooling"):
        return chosen
    own = header.metadata.get(f"{header.architecture}.pooling_type", _NONE)
    if own == _RANK:
        return "rank"
    if not spec.embeddings and not header.is_encoder:
        return ""
    return "mean" if own == _NONE else "default"


def _what_it_can(plan: _Plan) -> Loaded:
    template = plan.header.metadata.get("tokenizer.chat_template")
    can = {Capability.TOKENIZE, Capability.DETOKENIZE}
    missing: dict[Capability, str] = {}
    if plan.pooling == "rank":
        can.add(Capability.RERANK)
        for capability in (Capability.GENERATE, Capability.CHAT, Capability.EMBED, Capability.SCORE):
            missing[capability] = "it is a reranking model."
    elif plan.pooling:
        can.add(Capability.EMBED)
        for capability in (Capability.GENERATE, Capability.CHAT, Capability.SCORE):
            missing[capability] = "it is declared, or made, for embeddings."
        missing[Capability.RERANK] = "it is no reranking model."
    else:
        can |= {Capability.GENERATE, Capability.SCORE}
        if isinstance(template, str) and template:
            can.add(Capability.CHAT)
        else:
            missing[Capability.CHAT] = "its file has no chat template. Use Generate."
        missing[Capability.EMBED] = "declare it with `embeddings: true`."
        missing[Capability.RERANK] = "it is no reranking model."
    return Loaded(
        capabilities=frozenset(can),
        context_tokens=plan.context_tokens,
        chat_template=template if isinstance(template, str) else "",
        missing=missing,
    )


def _has_gpu(xllamacpp: Any) -> bool:
    cpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    return any(device["type"] != cpu for device in xllamacpp.get_device_info())


def _load_failed(spec: ModelSpec, words: str) -> MeshError:
    """Return the error for a load that llama.cpp refused, with the first of its own words that say why."""
    errors = [line.split(" E ", 1)[1].strip() for line in words.splitlines() if " E " in line]
    why = (errors or [line for line in words.splitlines() if line.strip()] or ["no reason given"])[0]
    return LoadFailed(f"llama.cpp cannot load {spec.source or spec.name}: {why}", model=spec.name)


def _resident_bytes() -> int:
    try:
        return int(_STATM.read_text().split()[1]) * _PAGE
    except OSError:
        return 0
