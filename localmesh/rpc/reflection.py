"""Server reflection, so that buf curl and grpcurl need no .proto files."""

from collections.abc import Iterable
from typing import Any, Final

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

SERVICE: Final = "grpc.reflection.v1alpha.ServerReflection"
_SERVICE_V1: Final = "grpc.reflection.v1.ServerReflection"


def handlers(services: Iterable[str]) -> tuple[Any, ...]:
    """Return the generic handlers that reflect the services.

    v1 is v1alpha under another name, message for message; grpcio-reflection has only the old name, and newer tools ask
    for the new one first.

    Args:
        services: Full names. Their descriptors must be in protobuf's default pool.
    """
    servicer = reflection.aio.ReflectionServicer([*services, SERVICE])
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return tuple(
        grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method}) for name in (SERVICE, _SERVICE_V1)
    )
