"""Carries the messages of one streamed call both ways, over one attempt after another until one has answered."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import grpc

from localmesh.rpc.metadata import Metadata, of_response

_EOF: Final = grpc.aio.EOF

# A target may send empty headers long before its first message, and callers may wait for them; but the end of a refused
# call shows empty headers, too, an instant before its status. This tells them apart.
_EMPTY_HEADERS_AFTER_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a call to a target ended."""

    code: Any
    details: str
    initial: Iterable[tuple[str, str | bytes]]
    trailers: Iterable[tuple[str, str | bytes]]

    @classmethod
    def of_error(cls, error: Any) -> Self:
        """Read it from a grpc.aio.AioRpcError."""
        return cls(
            code=error.code(),
            details=error.details() or "",
            initial=tuple(error.initial_metadata() or ()),
            trailers=tuple(error.trailing_metadata() or ()),
        )

    @classmethod
    async def of_call(cls, call: Any) -> Self:
        """Read it from a call that has ended."""
        return cls(
            code=await call.code(),
            details=await call.details() or "",
            initial=tuple(await call.initial_metadata() or ()),
            trailers=tuple(await call.trailing_metadata() or ()),
        )


class _Upload:
    """Sends a caller's stream of requests to the present target, and again to the next one."""

    def __init__(self, context: Any, buffer_bytes: int) -> None:
        self._context = context
        self._limit = buffer_bytes
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._written = 0
        self._ended = False
        self._upstream: Any = None
        self._attached = asyncio.Event()
        self._writing = asyncio.Lock()
        self.keeping = True

    def settle(self) -> None:
        """Keep nothing any more: no other target will be asked."""
        self.keeping = False
        self._drop_written()

    def attach(self, upstream: Any) -> None:
        """Send to this call from now on, from the first message."""
        self._upstream = upstream
        self._written = 0
        self._attached.set()

    def detach(self) -> None:
        """Send nothing until there is another call."""
        self._upstream = None
        self._attached.clear()

    async def read_all(self) -> None:
        """Read the caller's requests, each after the one before was sent: the target's pace is the caller's."""
        while not self._ended:
            try:
                message = await self._context.read()
            except grpc.aio.BaseError:
                return  # the caller has left: the call is about to be cancelled
            if message is _EOF:
                self._ended = True
            else:
                self._kept.append(message)
                self._kept_bytes += len(message)
                if self._kept_bytes > self._limit:
                    self.keeping = False
            await self._attached.wait()
            await self.flush()

    async def flush(self) -> None:
        """Send what the present target has not got yet."""
        async with self._writing:
            upstream = self._upstream
            if upstream is None:
                return
            try:
                await upstream.wait_for_connection()
                while self._written < len(self._kept):
                    await _send(upstream, self._kept[self._written])
                    if self._upstream is not upstream:
                        return
                    self._written += 1
                    self._drop_written()
                if self._ended:
                    await upstream.done_writing()
            except (grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):
                # The target has ended the call; why, its status says to who reads the answer.
                if self._upstream is upstream:
                    self.detach()

    def _drop_written(self) -> None:
        if not self.keeping and self._written:
            del self._kept[: self._written]
            self._written = 0


async def _send(upstream: Any, message: bytes) -> None:
    """Send one message.

    Raises:
        grpc.aio.InternalError: The target has ended the call, perhaps well and with messages that are still to be read.
    """
    # grpc.aio's own write() (1.85) then declares the whole call failed: INTERNAL "Internal error from Core" takes the
    # place of the status that is on its way, and messages that came before it can no longer be read. So this goes one
    # layer below it.
    send = getattr(getattr(upstream, "_cython_call", None), "send_serialized_message", None)
    await (upstream.write(message) if send is None else send(message))


class Relay:
    """The caller's side of a streamed call."""

    def __init__(self, context: Any, *, request: bytes | None = None, buffer_bytes: int = 0) -> None:
        """Begin.

        Args:
            context: The grpc.aio.ServicerContext.
            request: The one request, where the method takes no stream.
            buffer_bytes: Bytes of a stream of requests to keep for another attempt.
        """
        self.context = context
        self.answered = False
        """Headers or a message have gone to the caller."""
        self._request = request
        self._upload = None if request is not None else _Upload(context, buffer_bytes)
        self._tasks = asyncio.TaskGroup()
        self._reader: asyncio.Task[None] | None = None
        self._headers = asyncio.Lock()
        self._first_message = asyncio.Event()

    @property
    def takes_stream(self) -> bool:
        """Whether the caller sends a stream of requests."""
        return self._upload is not None

    @property
    def replayable(self) -> bool:
        """Whether the call can be sent elsewhere: no answer yet, and all that the caller has sent is at hand."""
        return not self.answered and (self._upload is None or self._upload.keeping)

    async def __aenter__(self) -> Self:
        """Begin to read what the caller sends."""
        await self._tasks.__aenter__()
        if self._upload is not None:
            self._reader = self._tasks.create_task(self._upload.read_all())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop reading."""
        if self._reader is not None:
            self._reader.cancel()
        await self._tasks.__aexit__(kind, error, trace)

    async def run(
        self, start: Any, *, metadata: Metadata, timeout: float | None, on_first_byte: Callable[[], None] | None
    ) -> Ended | None:
        """Make one attempt: start the call, carry messages both ways until it has ended.

        Args:
            start: The multi-callable of the target's channel.
            metadata: To send with the call.
            timeout: Seconds that are left for it.
            on_first_byte: Called when the first message, or an OK without one, has arrived.

        Returns:
            How it ended, or None where the caller has left.
        """
        mine = []
        if self._upload is None:
            upstream = start(self._request, metadata=metadata, timeout=timeout)
        else:
            upstream = start(metadata=metadata, timeout=timeout)
            self._upload.attach(upstream)
            mine.append(self._tasks.create_task(self._upload.flush()))
        mine.append(self._tasks.create_task(self._pass_headers(upstream)))
        try:
            while (message := await upstream.read()) is not _EOF:
                if not self._first_message.is_set():
                    if on_first_byte is not None:
                        on_first_byte()
                    await self._begin_answer(upstream)
                try:
                    await self.context.write(message)
                except grpc.aio.BaseError:
                    return None
            if on_first_byte is not None and not self._first_message.is_set():
                on_first_byte()
            return await Ended.of_call(upstream)
        except grpc.aio.AioRpcError as error:
            return Ended.of_error(error)
        finally:
            upstream.cancel()  # nothing if it has ended; else the caller left, and the target must hear of it at once
            if self._upload is not None:
                self._upload.detach()
            async with self._headers:  # never in the middle of sending them
                for task in mine:
                    task.cancel()

    async def _begin_answer(self, upstream: Any) -> None:
        """Make sure that the target's headers go before its first message."""
        self._first_message.set()
        headers = of_response(await upstream.initial_metadata())
        async with self._headers:
            begun = self.answered
            self._settle()
            if headers and not begun:  # empty ones go with the message
                await self.context.send_initial_metadata(headers)

    async def _pass_headers(self, upstream: Any) -> None:
        """Pass the target's headers on when they arrive, also if its first message takes long."""
        headers = of_response(await upstream.initial_metadata())
        if not headers:
            try:
                async with asyncio.timeout(_EMPTY_HEADERS_AFTER_SECONDS):
                    await self._first_message.wait()
            except TimeoutError:
                pass
        async with self._headers:
            if self.answered or self._first_message.is_set() or upstream.done():
                return
            self._settle()
            try:
                await self.context.send_initial_metadata(headers)
            except grpc.aio.BaseError:
                return  # the caller has left

    def _settle(self) -> None:
        self.answered = True
        if self._upload is not None:
            self._upload.settle()
