"""A worker, from its configuration."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from localmesh.app import enrolment
from localmesh.app.config import Config
from localmesh.app.config_reader import child_environment
from localmesh.app.lifeline import Ready
from localmesh.app.names import node_name_of_host, worker_folder
from localmesh.app.serving import server_config, tells_who_served, tls_files
from localmesh.core.budgets import budget_bytes
from localmesh.core.clock import SystemClock
from localmesh.core.ids import NodeName, node_name
from localmesh.rpc.addresses import parse_listen, split_host_port
from localmesh.rpc.errors import ConfigError
from localmesh.worker.agent import Worker
from localmesh.worker.config import WorkerConfig
from localmesh.worker.ports import PortRange

_LOG = logging.getLogger(__name__)
_REGISTER_SECONDS = 10.0
_LOOK_SECONDS = 0.02


@asynccontextmanager
async def serve(config: Config) -> AsyncIterator[Ready]:
    """Run a worker while the block runs; leaving it lets replicas finish what they do.

    It is ready when it is registered, or after 10 s without: it goes on trying.

    Raises:
        MeshError: It cannot start.
    """
    clock = SystemClock()
    config = await enrolment.enrolled(config, own_folder(config))
    worker = Worker(worker_config(config), clock=clock)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(worker.run(), name="worker")
        await worker.listening()
        deadline = clock.monotonic() + _REGISTER_SECONDS
        while not worker.registered and clock.monotonic() < deadline:  # noqa: ASYNC110 - it is true by the clock
            await asyncio.sleep(_LOOK_SECONDS)
        detail = f"node {worker.node}"
        if not worker.registered:
            registries = ", ".join(config.worker.registries)
            _LOG.warning("the registry at %s has not taken this node in yet; it goes on trying", registries)
            detail += f", not registered yet at {registries}"
        try:
            yield Ready(endpoint=worker.endpoint, port=split_host_port(worker.endpoint)[1], detail=detail)
        finally:
            worker.stop()
            await asyncio.wait([running])


def own_folder(config: Config) -> Path:
    """Return the worker's own folder, which is called after its node.

    Raises:
        ConfigError: The node's name cannot be used.
    """
    try:
        name = node_name(config.worker.name) if config.worker.name else node_name_of_host(socket.gethostname())
    except ValueError as problem:
        raise ConfigError(str(problem), field="worker.name") from None
    return worker_folder(config.state_dir, name)


def worker_config(config: Config) -> WorkerConfig:
    """Return the worker's settings.

    Raises:
        ConfigError: They cannot be used; the message names the one.
    """
    own = config.worker
    folder = own_folder(config)
    server_config(config, listen=own.listen, advertise=own.advertise)  # before anything is made or measured
    try:
        ports = None if own.replica_ports == "0" else PortRange.parse(own.replica_ports)
        budget_bytes(own.memory_budget, total_bytes=1)
    except ValueError as problem:
        raise ConfigError(str(problem), field="worker") from None
    return WorkerConfig(
        mesh=config.mesh,
        node=NodeName(folder.name),
        registries=own.registries,
        models_dir=config.models_folder,
        backends_dir=config.backends_folder,
        state_dir=folder,
        cache_dir=folder / "cache",
        run_dir=folder / "run",
        listen=own.listen,
        advertise=own.advertise,
        replica_ports=ports,
        replica_listen_host=parse_listen(own.listen).host,
        labels=own.labels,
        max_replicas_per_model=own.max_replicas_per_model,
        memory_budget=own.memory_budget,
        gpu_memory_budget=own.memory_budget,
        tls=tls_files(config),
        insecure=config.insecure,
        join_token=own.join_token,
        drain_seconds=config.drain_seconds,
        max_message_bytes=config.max_message_bytes,
        served_by_trailers=tells_who_served(config, own.listen),
        environment=child_environment(),
    )
