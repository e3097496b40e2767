"""Which services a replica's server has: InferenceService always, backend.Backend served or forwarded."""

from typing import Any

from localmesh.core.clock import Clock
from localmesh.core.records import ModelSpec
from localmesh.replica.admission import Admission
from localmesh.replica.backend import SERVICE as BACKEND
from localmesh.replica.backend import BackendServicer
from localmesh.replica.engines.base import Engine
from localmesh.replica.engines.process import ProcessEngine
from localmesh.replica.forward import RawBackend
from localmesh.replica.inference import SERVICE as INFERENCE
from localmesh.replica.inference import InferenceServicer
from localmesh.replica.memory import own_memory_bytes
from localmesh.rpc.server import GrpcServer
from localmesh.thirdparty.backend_pb2_grpc import add_BackendServicer_to_server
from localmesh.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server


def add_services(server: GrpcServer, *, engine: Engine, admission: Admission, spec: ModelSpec, clock: Clock) -> None:
    """Add them, and the model's name to those that health knows."""
    server.add(add_InferenceServiceServicer_to_server, InferenceServicer(engine, admission), INFERENCE)
    if isinstance(engine, ProcessEngine):
        server.add(_add_handler, RawBackend(engine, admission, spec, clock), BACKEND)
    else:
        servicer = BackendServicer(engine, admission, spec, own_memory_bytes)
        server.add(add_BackendServicer_to_server, servicer, BACKEND)
    server.health.set_serving(spec.name, False)


def _add_handler(handler: Any, server: Any) -> None:
    server.add_generic_rpc_handlers((handler,))
