"""A router, from its configuration."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from localmesh import __version__
from localmesh.app.config import Config
from localmesh.app.lifeline import Ready
from localmesh.app.names import node_name_of_host
from localmesh.app.serving import beside, server_config, tls_files
from localmesh.app.store_client import open_store
from localmesh.core.clock import SystemClock
from localmesh.router.config import RouterConfig
from localmesh.router.node import Router
from localmesh.rpc.addresses import parse_listen
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.errors import ConfigError
from localmesh.scheduling.autoscale import AutoscaleConfig
from localmesh.scheduling.reconcile import ReconcileConfig
from localmesh.store.holder import Holder
from localmesh.store.leader import LeaderElection
from localmesh.store.mirror import Mirror


@asynccontextmanager
async def serve(config: Config) -> AsyncIterator[Ready]:
    """Run a router while the block runs.

    Raises:
        MeshError: It cannot start.
    """
    clock = SystemClock()
    settings = router_config(config)
    async with (
        ChannelPool(settings.server.tls, config.max_message_bytes, clock) as channels,
        open_store(config, clock) as store,
    ):
        mirror = Mirror(store)
        try:
            holder = Holder(mirror, settings.name)
        except ValueError as problem:
            raise ConfigError(f"router.name = {settings.name!r} cannot be used: {problem}", field="name") from None
        router = Router(
            settings,
            store=store,
            mirror=mirror,
            holder=holder,
            election=LeaderElection(store, settings.name),
            channels=channels,
            clock=clock,
        )
        # The mirror and the holder outlive the router, so that running calls end as they should while it drains.
        async with beside(mirror.run(), holder.run()):
            await mirror.loaded()
            async with beside(router.run()):
                await router.started.wait()
                yield Ready(endpoint=router.endpoint, port=router.server.port)


def router_config(config: Config) -> RouterConfig:
    """Return the router's settings.

    Raises:
        ConfigError: They cannot be used.
    """
    own = config.router
    tls_files(config)
    listen = parse_listen(own.listen)
    name = own.name or str(node_name_of_host(socket.gethostname(), f"-{listen.port}" if listen.port else ""))
    return RouterConfig(
        mesh=config.mesh,
        name=name,
        server=server_config(config, listen=own.listen, advertise=own.advertise),
        version=__version__,
        hold_seconds=own.hold_seconds,
        reconcile=ReconcileConfig(
            autoscale=AutoscaleConfig(busy_seconds=own.busy_seconds, idle_seconds=own.idle_seconds),
            drain_patience_seconds=own.drain_patience_seconds,
        ),
    )
