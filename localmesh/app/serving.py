"""What every component's server takes from the configuration."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from localmesh.app.config import Config
from localmesh.core.errors import MeshError
from localmesh.rpc.addresses import parse_listen
from localmesh.rpc.errors import ConfigError
from localmesh.rpc.server import ServerConfig, check_listen
from localmesh.rpc.tls import TlsFiles


def tls_files(config: Config) -> TlsFiles | None:
    """Return the component's certificates, or None where there are none.

    Raises:
        ConfigError: Only some of the three files are given.
    """
    tls = config.tls
    given = (tls.cert, tls.key, tls.ca)
    if tls.cert is None or tls.key is None or tls.ca is None:
        if any(given):
            raise ConfigError(
                "tls.cert, tls.key and tls.ca are given together or not at all: name all three PEM files", field="tls"
            )
        return None
    return TlsFiles(cert=tls.cert, key=tls.key, ca=tls.ca)


def server_config(config: Config, *, listen: str, advertise: str) -> ServerConfig:
    """Return how a component's server listens.

    Raises:
        ConfigError: The address cannot be read, or would be open to other machines without TLS.
    """
    found = ServerConfig(
        listen=listen,
        tls=tls_files(config),
        insecure=config.insecure,
        max_message_bytes=config.max_message_bytes,
        drain_seconds=config.drain_seconds,
        advertise=advertise,
    )
    check_listen(found)
    return found


def tells_who_served(config: Config, listen: str) -> bool:
    """Whether callers are told by trailers which node and replica served them."""
    if config.worker.served_by == "auto":
        return parse_listen(listen).loopback
    return config.worker.served_by == "on"


@asynccontextmanager
async def beside(*tasks: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.TaskGroup]:
    """Run tasks beside the block and cancel them when it is left. If one fails, the block is cancelled.

    What the block itself raises is raised as it is, not in a group.
    """
    failure: MeshError | None = None
    async with asyncio.TaskGroup() as group:
        started = [group.create_task(task) for task in tasks]
        try:
            yield group
        except MeshError as error:
            failure = error
        finally:
            for task in started:
                task.cancel()
    if failure is not None:
        raise failure
