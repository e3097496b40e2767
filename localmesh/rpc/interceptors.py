"""What surrounds every call of our servers. Written once for all four kinds of call."""

import asyncio
import inspect
import logging
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import lru_cache
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.message import DecodeError

from localmesh.core.errors import ComponentUnreachable, InternalError, InvalidRequest, MeshError, MethodUnknown
from localmesh.rpc.errors import abort_with
from localmesh.rpc.identity import IdentityPolicy, peer_identity

_log = logging.getLogger(__name__)

_MAKERS: Final[dict[tuple[bool, bool], Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Runs `around` around every call, of whichever kind.

    A handler that is neither a coroutine function nor an async generator function is refused: grpc would run it in a
    thread, outside of `around`, and so past the check of the caller's identity.
    """

    def __init__(self) -> None:
        # Methods are few but callers may invent names: bounded.
        self._wrapped = lru_cache(maxsize=1024)(self._wrap)

    @abstractmethod
    def around(self, method: str, context: Any) -> AbstractAsyncContextManager[None]:
        """Return what is entered before the servicer is called and left when it is done.

        Args:
            method: Full name, "/package.Service/Method".
            context: The grpc.aio.ServicerContext.
        """

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Return the handler that gRPC shall call."""
        handler = await continuation(details)
        return handler and self._wrapped(handler, details.method)

    def _wrap(self, handler: Any, method: str) -> Any:
        if _is_only_declared(_behaviour(handler)):
            handler = _unknown(method)
        behaviour = _behaviour(handler)
        if inspect.isasyncgenfunction(behaviour):
            wrapped: Any = self._around_generator(behaviour, method)
        elif inspect.iscoroutinefunction(behaviour):
            wrapped = self._around_coroutine(behaviour, method)
        else:
            raise TypeError(f"{method} is served by neither a coroutine nor an async generator function")
        make = _MAKERS[handler.request_streaming, handler.response_streaming]
        return make(
            wrapped,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _around_coroutine(self, behaviour: Any, method: str) -> Any:
        async def call(request: Any, context: Any) -> Any:
            async with self.around(method, context):
                return await behaviour(request, context)

        return call

    def _around_generator(self, behaviour: Any, method: str) -> Any:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            async with self.around(method, context), aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response

        return call


class ErrorInterceptor(CallInterceptor):
    """Turns what a servicer raises into a status.

    A MeshError becomes its status with details. A request that cannot be decoded becomes INVALID_ARGUMENT. Anything
    else is a bug: INTERNAL "internal error" for the caller, one log record with the traceback for us. Cancellation and
    a servicer's own context.abort pass.
    """

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Return the handler that gRPC shall call; for a method that nobody serves, one that says so."""
        handler = await continuation(details)
        return self._wrapped(handler or _NOBODY, details.method)

    @asynccontextmanager
    async def around(self, method: str, context: Any) -> AsyncIterator[None]:
        """See CallInterceptor."""
        try:
            yield
        except grpc.aio.UsageError as error:
            await self._bug(method, context, error)
        except grpc.aio.InternalError as error:
            # Sending failed: as a rule because the caller has left, and then telling it fails, too.
            _log.debug("a call of %s broke off: %s", method, error)
            await _abort(context, InternalError("internal error: the call broke off"))
        except grpc.aio.BaseError:  # a servicer's own abort
            raise
        except MeshError as error:
            await _abort(context, error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Not this call was cancelled, but one that it waited for: its channel was closed under it. Without a status
            # the caller would wait until its deadline.
            await _abort(context, ComponentUnreachable("the connection that served this call was closed: try again"))
        except Exception as error:  # noqa: BLE001 - the edge: a bug in a servicer must not end the server
            if (failure := _failure_in(error)) is not None:
                await _abort(context, failure)
            await self._bug(method, context, error)

    @staticmethod
    async def _bug(method: str, context: Any, error: Exception) -> NoReturn:
        _log.error("a call of %s failed unexpectedly", method, exc_info=error)
        await _abort(context, InternalError("internal error; the server's log has the details"))

    def _wrap(self, handler: Any, method: str) -> Any:
        if handler is _NOBODY:
            handler = _unknown(method)
        return super()._wrap(_with_safe_decoding(handler), method)


async def _abort(context: Any, error: MeshError) -> NoReturn:
    """End a call with a failure; where its caller has left meanwhile, as one that was cancelled."""
    try:
        await abort_with(context, error)
    except (grpc.aio.InternalError, grpc.aio.UsageError) as nobody_listens:  # the latter: it was tried already
        # grpc would log this with a traceback, and any stranger with a short deadline could fill the log.
        raise asyncio.CancelledError from nobody_listens


def _failure_in(error: Exception) -> MeshError | None:
    """Return the failure of a TaskGroup in which nothing but expected failures happened: the first of them."""
    if not isinstance(error, ExceptionGroup):
        return None
    expected, unexpected = error.split(MeshError)
    if expected is None or unexpected is not None:
        return None
    first: BaseException = expected
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first if isinstance(first, MeshError) else None


class IdentityInterceptor(CallInterceptor):
    """Refuses calls that a policy does not allow. Without TLS nobody has an identity, and it is not installed."""

    def __init__(self, policy: IdentityPolicy) -> None:
        super().__init__()
        self._policy = policy

    @asynccontextmanager
    async def around(self, method: str, context: Any) -> AsyncIterator[None]:
        """See CallInterceptor."""
        self._policy(method, peer_identity(context))
        yield


ORDER: Final[tuple[type[CallInterceptor], ...]] = (
    ErrorInterceptor,  # first, so that it also maps what the others raise
    IdentityInterceptor,  # before anything that costs work or shows state
)
"""Our interceptors, the outermost first. Those of a component come after all of them."""


def chain(policy: IdentityPolicy | None, own: Iterable[Any]) -> tuple[Any, ...]:
    """Return a server's interceptors in ORDER, then a component's own.

    Args:
        policy: Who may call what; None where callers have no identity.
        own: Further grpc.aio.ServerInterceptors, outermost first.
    """
    built: dict[type[CallInterceptor], CallInterceptor] = {ErrorInterceptor: ErrorInterceptor()}
    if policy is not None:
        built[IdentityInterceptor] = IdentityInterceptor(policy)
    return (*(built[kind] for kind in ORDER if kind in built), *own)


_NOBODY: Final = object()


def _behaviour(handler: Any) -> Any:
    return handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream


def _is_only_declared(behaviour: Any) -> bool:
    """Whether a servicer leaves a method of its protocol to the generated class, which raises NotImplementedError."""
    return str(getattr(behaviour, "__module__", "")).endswith("_pb2_grpc")


def _unknown(method: str) -> Any:
    async def refuse(request: Any, context: Any) -> None:  # noqa: ARG001 - grpc's signature
        raise MethodUnknown(f"this server does not serve {method[:200]}", method=method[:200])

    return grpc.stream_stream_rpc_method_handler(refuse)


class _Undecodable:
    """Stands for a request whose bytes are no message of its type."""


_UNDECODABLE: Final = _Undecodable()
_SAYS: Final = "the request's bytes are no message of the type that the method takes"


def _with_safe_decoding(handler: Any) -> Any:
    """Return the handler with a deserializer whose failure reaches the interceptor.

    grpc decodes a single request before it calls the servicer, outside every interceptor: the failure would become
    UNKNOWN with the text of a Python exception, and a traceback in the log for any stranger's bytes.
    """
    decode = handler.request_deserializer
    if decode is None:
        return handler

    def decode_or_raise(raw: bytes) -> Any:
        try:
            return decode(raw)
        except DecodeError as error:
            raise InvalidRequest(_SAYS, field="") from error

    def decode_or_mark(raw: bytes) -> Any:
        try:
            return decode(raw)
        except DecodeError:
            return _UNDECODABLE

    if handler.request_streaming:
        return handler._replace(request_deserializer=decode_or_raise)
    kind = "unary_stream" if handler.response_streaming else "unary_unary"
    checked = _checking(getattr(handler, kind))
    return handler._replace(request_deserializer=decode_or_mark, **{kind: checked})


def _checking(behaviour: Any) -> Any:
    if inspect.isasyncgenfunction(behaviour):

        async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
            if request is _UNDECODABLE:
                raise InvalidRequest(_SAYS, field="")
            async with aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response

        return generate
    if inspect.iscoroutinefunction(behaviour):

        async def call(request: Any, context: Any) -> Any:
            if request is _UNDECODABLE:
                raise InvalidRequest(_SAYS, field="")
            return await behaviour(request, context)

        return call
    return behaviour  # refused where it is wrapped
