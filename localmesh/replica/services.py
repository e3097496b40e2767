"""Which services a replica's server has: InferenceService always, backend.Backend served or forwarded."""

from localmesh.core.records import ModelSpec
from localmesh.replica.admission import Admission
from localmesh.replica.backend import SERVICE as BACKEND
from localmesh.replica.backend import BackendServicer
from localmesh.replica.engines.base import Engine
from localmesh.replica.inference import SERVICE as INFERENCE
from localmesh.replica.inference import InferenceServicer
from localmesh.replica.memory import own_memory_bytes
from localmesh.replica.served_by import ServedBy
from localmesh.rpc.server import GrpcServer
from localmesh.thirdparty.backend_pb2_grpc import add_BackendServicer_to_server
from localmesh.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server


def add_services(
    server: GrpcServer, *, engine: Engine, admission: Admission, served_by: ServedBy, spec: ModelSpec
) -> None:
    """Add them, and the model's name to those that health knows."""
    server.add(add_InferenceServiceServicer_to_server, InferenceServicer(engine, admission, served_by), INFERENCE)
    server.add(
        add_BackendServicer_to_server, BackendServicer(engine, admission, served_by, spec, own_memory_bytes), BACKEND
    )
    server.health.set_serving(spec.name, False)
