"""Commands that ask models."""

import asyncio
import sys
from contextlib import AsyncExitStack
from typing import Any

import grpc

from localmesh.app.exits import Exit
from localmesh.cli import output, tables
from localmesh.cli.connection import Command, Connection, connect, for_model, translate
from localmesh.cli.progress import ProgressLine, describe
from localmesh.core.errors import InvalidRequest
from localmesh.v1 import inference_service_pb2 as inference
from localmesh.v1 import router_service_pb2 as router

_SHOWN_NUMBERS = 6


async def generate(command: Command) -> int:
    """`generate MODEL [PROMPT]`: continue a text, printed as it is made."""
    given = command.arguments
    prompt = _text(given.prompt)
    async with connect(command.config) as mesh:
        await _loaded(mesh, command)
        metadata = for_model(given.model)
        if command.json:
            whole = inference.GenerateRequest(prompt=prompt, sampling=_sampling(command))
            output.print_message(await mesh.inference.Generate(whole, metadata=metadata, timeout=command.timeout))
            return Exit.OK
        request = inference.StreamGenerateRequest(prompt=prompt, sampling=_sampling(command))
        stream = mesh.inference.StreamGenerate(request, metadata=metadata, timeout=command.timeout)
        await _print_stream(stream, "text", verbose=given.verbose)
    return Exit.OK


async def chat_once(command: Command) -> int:
    """`chat MODEL -m TEXT`: one answer."""
    given = command.arguments
    messages = [*_system(command), inference.ChatMessage(role=inference.ROLE_USER, content=_text(given.message))]
    async with connect(command.config) as mesh:
        await _loaded(mesh, command)
        if command.json:
            request = inference.ChatRequest(messages=messages, sampling=_sampling(command))
            metadata = for_model(given.model)
            output.print_message(await mesh.inference.Chat(request, metadata=metadata, timeout=command.timeout))
        else:
            await _turn(mesh, command, messages)
    return Exit.OK


def chat(command: Command) -> int:
    """`chat MODEL`: a conversation in the terminal, or one answer with -m."""
    given = command.arguments
    if given.message is not None or command.json or not sys.stdin.isatty():
        return asyncio.run(chat_once(command))
    with asyncio.Runner() as runner:
        return _converse(command, runner)


def _converse(command: Command, runner: asyncio.Runner) -> int:
    # The prompt is read outside of the event loop, so that Ctrl-C there ends the program and not a thread.
    stack = AsyncExitStack()
    mesh = runner.run(stack.enter_async_context(connect(command.config)))
    try:
        runner.run(_loaded(mesh, command))
        sys.stderr.write("Type a message. Ctrl-D ends, Ctrl-C stops an answer.\n")
        messages = _system(command)
        while True:
            try:
                text = input("> ")
            except EOFError:
                output.write_line("")
                return Exit.OK
            if text.strip():
                _exchange(mesh, command, runner, messages, text)
    except grpc.RpcError as error:
        raise translate(error, command.config) from error
    finally:
        runner.run(stack.aclose())


def _exchange(
    mesh: Connection, command: Command, runner: asyncio.Runner, messages: list[inference.ChatMessage], text: str
) -> None:
    messages.append(inference.ChatMessage(role=inference.ROLE_USER, content=text))
    try:
        answer = runner.run(_turn(mesh, command, messages))
    except KeyboardInterrupt:
        output.write_line("")
        messages.pop()
    else:
        messages.append(inference.ChatMessage(role=inference.ROLE_ASSISTANT, content=answer))


async def embed(command: Command) -> int:
    """`embed MODEL [TEXT...]`: vectors of texts."""
    given = command.arguments
    inputs = given.text or [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not inputs:
        raise InvalidRequest("there is no text to embed", field="inputs")
    async with connect(command.config) as mesh:
        await _loaded(mesh, command)
        request = inference.EmbedRequest(inputs=inputs)
        found = await mesh.inference.Embed(request, metadata=for_model(given.model), timeout=command.timeout)
    if command.json:
        output.print_message(found)
        return Exit.OK
    columns = [tables.Column("NUMBERS", right=True), tables.Column("VECTOR"), tables.Column("TEXT")]
    rows = []
    for text, embedding in zip(inputs, found.embeddings, strict=True):
        start = " ".join(f"{value:+.4f}" for value in embedding.values[:_SHOWN_NUMBERS])
        rows.append([str(len(embedding.values)), f"{start} ...", text if len(text) <= 60 else text[:57] + "..."])
    output.write_line(tables.render(columns, rows))
    return Exit.OK


async def tokenize(command: Command) -> int:
    """`tokenize MODEL [TEXT]`: a text's tokens."""
    given = command.arguments
    async with connect(command.config) as mesh:
        await _loaded(mesh, command)
        request = inference.TokenizeRequest(text=_text(given.text), add_special=given.special)
        found = await mesh.inference.Tokenize(request, metadata=for_model(given.model), timeout=command.timeout)
    if command.json:
        output.print_message(found)
    else:
        output.write_line(" ".join(map(str, found.tokens)))
    return Exit.OK


async def _loaded(mesh: Connection, command: Command) -> None:
    """Wait until the model is loaded, and show how it goes."""
    request = router.EnsureLoadedRequest(model=command.arguments.model)
    with ProgressLine() as progress:
        async for state in mesh.router.EnsureLoaded(request, timeout=command.timeout):
            if not state.ready:
                progress.show(describe(state.replica))


async def _turn(mesh: Connection, command: Command, messages: list[inference.ChatMessage]) -> str:
    request = inference.StreamChatRequest(messages=messages, sampling=_sampling(command))
    metadata = for_model(command.arguments.model)
    stream = mesh.inference.StreamChat(request, metadata=metadata, timeout=command.timeout)
    return await _print_stream(stream, "content", verbose=command.arguments.verbose)


async def _print_stream(stream: Any, field: str, *, verbose: bool) -> str:
    pieces = []
    last = None
    async for piece in stream:
        text = getattr(piece, field)
        pieces.append(text)
        output.write_text(text)
        last = piece
    output.write_line("")
    if verbose and last is not None:
        sys.stderr.write(_summary(last) + "\n")
    return "".join(pieces)


def _summary(last: Any) -> str:
    reason = inference.FinishReason.Name(last.finish_reason).removeprefix("FINISH_REASON_").lower()
    took = last.timings.completion.ToMilliseconds() / 1000
    speed = f", {last.usage.completion_tokens / took:.0f} tokens/s" if took > 0 else ""
    return (
        f"[{tables.count(last.usage.prompt_tokens, 'token')} read, "
        f"{tables.count(last.usage.completion_tokens, 'token')} made{speed}; ended by: {reason}]"
    )


def _system(command: Command) -> list[inference.ChatMessage]:
    text = command.arguments.system
    return [inference.ChatMessage(role=inference.ROLE_SYSTEM, content=text)] if text else []


def _sampling(command: Command) -> inference.SamplingOptions:
    given = command.arguments
    options = inference.SamplingOptions(stop=given.stop or ())
    for name in ("max_tokens", "temperature", "top_p", "top_k", "seed"):
        value = getattr(given, name)
        if value is not None:
            setattr(options, name, value)
    return options


def _text(given: str | None) -> str:
    return sys.stdin.read() if given is None or given == "-" else given
