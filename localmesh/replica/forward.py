"""Forwards backend.Backend as bytes to a foreign backend: every method, also those that we do not know."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from localmesh.core.clock import Clock
from localmesh.core.errors import CapabilityUnsupported
from localmesh.core.records import ModelSpec
from localmesh.replica.admission import Admission
from localmesh.replica.backend import SERVICE, already_loaded
from localmesh.replica.engines.process import ProcessEngine
from localmesh.rpc.errors import CallTimedOut
from localmesh.rpc.proxy import Failure, ProxyCall, ProxyHandler, Target, kinds_of
from localmesh.thirdparty import backend_pb2 as pb

_UNCOUNTED = frozenset({"Status", "GetMetrics", "ModelMetadata"})
"""Answered beside the requests that run: they are no work."""


class RawBackend(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc ships no types
    """backend.Backend of a replica whose engine is a foreign backend.

    The replica itself answers what would change or stop the backend (LoadModel, Free), and Health, which most backends
    leave unanswered while they compute. All else goes through as it is.
    """

    def __init__(self, engine: ProcessEngine, admission: Admission, spec: ModelSpec, clock: Clock) -> None:
        self._engine = engine
        self._admission = admission
        self._spec = spec
        self._proxy = ProxyHandler(
            self._route, clock=clock, kinds=kinds_of([pb.DESCRIPTOR.services_by_name["Backend"]])
        )
        self._own = grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Health": _unary(self._health, pb.HealthMessage),
                "LoadModel": _unary(self._load_model, pb.ModelOptions),
                "Free": _unary(self._free, pb.HealthMessage),
            },
        )

    def service(self, handler_call_details: Any) -> Any:
        """Return the handler of a method of that service."""
        if not handler_call_details.method.startswith(f"/{SERVICE}/"):
            return None
        return self._own.service(handler_call_details) or self._proxy.service(handler_call_details)

    @asynccontextmanager
    async def _route(self, call: ProxyCall) -> AsyncIterator[Target]:
        if call.method.rpartition("/")[2] in _UNCOUNTED:
            self._admission.check_open(call.metadata)
            yield self._target(_nowhere_else)
            return
        with self._admission.admit(call.metadata):
            async with self._engine.slots.taken() as use:

                def failed(failure: Failure) -> bool:
                    use.timed_out = isinstance(failure.error, CallTimedOut)
                    return _nowhere_else(failure)

                yield self._target(failed)

    def _target(self, on_failure: Callable[[Failure], bool]) -> Target:
        return Target(
            channel=self._engine.channel,
            extra_metadata=self._engine.metadata,
            name=str(self._admission.replica),
            on_failure=on_failure,
        )

    async def _health(self, request: pb.HealthMessage, context: Any) -> pb.Reply:  # noqa: ARG002 - gRPC's signature
        return pb.Reply(message=b"OK")

    async def _load_model(self, request: pb.ModelOptions, context: Any) -> pb.Result:
        self._admission.check(context.invocation_metadata())
        return already_loaded(self._spec, request)

    async def _free(self, request: pb.HealthMessage, context: Any) -> pb.Result:  # noqa: ARG002 - gRPC's signature
        raise CapabilityUnsupported(
            "a client cannot unload a replica: the mesh does. Delete the model, or change its policy.",
            model=self._spec.name,
            capability="Free",
        )


def _nowhere_else(failure: Failure) -> bool:  # noqa: ARG001 - the proxy's signature
    """Say that the call is not tried again: there is one backend."""
    return False


def _unary(behaviour: Any, request: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        behaviour,
        request_deserializer=request.FromString,
        response_serializer=lambda message: message.SerializeToString(),
    )
