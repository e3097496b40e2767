"""What a command has at hand: its arguments, its configuration, and stubs of router and registry."""

import argparse
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from localmesh.app.config import Config
from localmesh.app.serving import tls_files
from localmesh.core.clock import SystemClock
from localmesh.core.errors import MeshError
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.errors import from_rpc_error
from localmesh.rpc.metadata import MODEL
from localmesh.v1 import inference_service_pb2_grpc, registry_service_pb2_grpc, router_service_pb2_grpc


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One run of the command."""

    arguments: argparse.Namespace
    config: Config

    @property
    def json(self) -> bool:
        """Whether the output is for programs."""
        return self.config.client.output == "json"

    @property
    def timeout(self) -> float:
        """Seconds that a call may take."""
        return self.config.client.timeout_seconds


class Connection:
    """Stubs of the mesh."""

    def __init__(self, config: Config, pool: ChannelPool) -> None:
        router, registry = pool.get(config.client.router), pool.get(config.client.registry)
        self.registry: Any = registry_service_pb2_grpc.RegistryServiceStub(registry)
        self.router: Any = router_service_pb2_grpc.RouterServiceStub(router)
        self.inference: Any = inference_service_pb2_grpc.InferenceServiceStub(router)


@asynccontextmanager
async def connect(config: Config) -> AsyncIterator[Connection]:
    """Yield stubs of the configured mesh. Nothing is sent before the first call.

    Raises:
        MeshError: A call within failed: what gRPC raised, translated.
    """
    pool = ChannelPool(tls=tls_files(config), max_message_bytes=config.max_message_bytes, clock=SystemClock())
    try:
        yield Connection(config, pool)
    except grpc.RpcError as error:
        raise translate(error, config) from error
    finally:
        await pool.close()


def translate(error: Any, config: Config) -> MeshError:
    """Return the failure in the words of this mesh."""
    known = (config.client.router, config.client.registry)
    text = error.details() or ""
    endpoint = next((address for address in known if address in text), " or ".join(known))
    return from_rpc_error(error, endpoint=endpoint)


def for_model(model: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata that names a call's model."""
    return ((MODEL, model),)


async def pages(call: Any, request: Callable[..., Any], field: str, command: Command) -> AsyncIterator[Any]:
    """Yield the items of all pages of a list."""
    token = ""
    while True:
        page = await call(request(page_token=token, page_size=1000), timeout=command.timeout)
        for item in getattr(page, field):
            yield item
        token = page.next_page_token
        if not token:
            return
