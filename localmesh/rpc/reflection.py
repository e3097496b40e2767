"""Server reflection, so that buf curl and grpcurl need no .proto files."""

from collections.abc import Iterable
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

SERVICE: Final = "grpc.reflection.v1alpha.ServerReflection"
_SERVICE_V1: Final = "grpc.reflection.v1.ServerReflection"


class _Pool:
    """Protobuf's default pool, with methods as symbols of their own: protobuf 6 finds only their services."""

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        """Return the file that declares a symbol.

        Raises:
            KeyError: None does.
        """
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            found = self._pool.FindServiceByName(service)
            found.FindMethodByName(method)
            return found.file


def handlers(services: Iterable[str]) -> tuple[Any, ...]:
    """Return the generic handlers that reflect the services.

    v1 is v1alpha under another name, message for message; grpcio-reflection has only the old name, and newer tools ask
    for the new one first.

    Args:
        services: Full names. Their descriptors must be in protobuf's default pool.
    """
    servicer = reflection.aio.ReflectionServicer([*services, SERVICE], pool=_Pool())
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return tuple(
        grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method}) for name in (SERVICE, _SERVICE_V1)
    )
