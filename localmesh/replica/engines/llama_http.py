"""A client for llama.cpp's HTTP server on a private unix socket, as small as that server allows.

One connection a request. Closing it (also by cancelling the caller) makes llama.cpp drop the task at its next batch,
even while it still reads the prompt; its callback API would notice at the next token only.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LINE_LIMIT = 1 << 20


class LlamaHttpError(Exception):
    """The server answered with an error."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        self.status = status
        self.message = str(body.get("message", "no message"))
        self.kind = str(body.get("type", ""))
        self.body = body
        super().__init__(f"{status} {self.kind}: {self.message}")


class LlamaHttpBroken(Exception):
    """The server broke off or spoke no HTTP."""


@dataclass(frozen=True, slots=True)
class _Response:
    status: int
    headers: Mapping[str, str]
    reader: asyncio.StreamReader


class LlamaHttp:
    """Requests to the server behind a unix socket."""

    def __init__(self, socket_path: Path, api_key: str) -> None:
        self._path = str(socket_path)
        self._key = api_key

    async def call(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON of an answer, or its text where it is not JSON.

        Raises:
            LlamaHttpError: The server answered with an error.
            LlamaHttpBroken: It broke off.
        """
        async with self._open(method, url, body) as response:
            return await _whole(response)

    async def stream(self, url: str, body: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any], None]:
        """Give the events of a streamed answer. Close the generator to cancel the request.

        Raises:
            LlamaHttpError: The server answered with an error, at once or in the middle.
            LlamaHttpBroken: It broke off before the end.
        """
        async with self._open("POST", url, body) as response:
            if response.status >= 400:
                await _whole(response)
            async with aclosing(_chunks(response)) as chunks, aclosing(_events(chunks)) as events:
                async for event in events:
                    if event is None:
                        return
                    yield event
        raise LlamaHttpBroken("the stream ended without its end mark")

    @asynccontextmanager
    async def _open(self, method: str, url: str, body: Mapping[str, Any] | None) -> AsyncIterator[_Response]:
        payload = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {url} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
        )
        writer: asyncio.StreamWriter | None = None
        try:
            reader, writer = await asyncio.open_unix_connection(self._path, limit=_LINE_LIMIT)
            writer.write(head.encode() + payload)
            await writer.drain()
            yield await _response(reader)
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:
            raise LlamaHttpBroken(f"{method} {url}: {error or type(error).__name__}") from error
        finally:
            if writer is not None:
                writer.close()


async def _response(reader: asyncio.StreamReader) -> _Response:
    first = (await reader.readline()).split(b" ", 2)
    if len(first) < 2 or not first[0].startswith(b"HTTP/") or not first[1].isdigit():
        raise LlamaHttpBroken("the server closed the connection without an answer")
    headers: dict[str, str] = {}
    while (line := await reader.readline()) not in (b"\r\n", b""):
        key, _, value = line.decode("latin-1").partition(":")
        headers[key.strip().lower()] = value.strip()
    return _Response(int(first[1]), headers, reader)


async def _chunks(response: _Response) -> AsyncGenerator[bytes, None]:
    reader = response.reader
    if response.headers.get("transfer-encoding", "").lower() == "chunked":
        while True:
            head = await reader.readline()
            try:
                size = int(head.split(b";")[0], 16)
            except ValueError:
                raise LlamaHttpBroken("the server broke off in the middle of an answer") from None
            if size == 0:
                return
            yield await reader.readexactly(size)
            await reader.readexactly(2)
    elif "content-length" in response.headers:
        yield await reader.readexactly(int(response.headers["content-length"]))
    else:
        yield await reader.read()


async def _whole(response: _Response) -> Any:
    async with aclosing(_chunks(response)) as chunks:
        text = b"".join([chunk async for chunk in chunks])
    try:
        data = json.loads(text)
    except ValueError:
        data = text.decode("utf-8", "replace")
    if response.status >= 400:
        error = data.get("error") if isinstance(data, dict) else None
        raise LlamaHttpError(response.status, error if isinstance(error, dict) else {"message": str(data)[:500]})
    return data


async def _events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[Mapping[str, Any] | None, None]:
    """Give the events of a server-sent stream; None is its end mark."""
    buffer = b""
    async for chunk in chunks:
        buffer += chunk
        while (end := buffer.find(b"\n\n")) >= 0:
            raw, buffer = buffer[:end], buffer[end + 2 :]
            if raw == b"data: [DONE]":
                yield None
                return
            if not raw.startswith((b"data: ", b"error: ")):
                continue  # a comment that keeps the connection alive
            event = json.loads(raw.split(b": ", 1)[1])
            error = event if raw.startswith(b"error: ") else event.get("error")
            if error:
                raise LlamaHttpError(int(error.get("code", 500)), error)
            yield event
