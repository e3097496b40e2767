"""A registry, from its configuration."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from localmesh.app import enrolment
from localmesh.app.config import Config
from localmesh.app.lifeline import Ready
from localmesh.app.serving import beside, server_config
from localmesh.app.store_client import open_store
from localmesh.core.clock import SystemClock
from localmesh.core.errors import MeshError
from localmesh.etcd import EtcdError, StoreReset
from localmesh.registry.config import RegistryConfig
from localmesh.registry.desired_folder import DesiredFolder
from localmesh.registry.service import SERVICE, RegistryServicer, fill_from_folder
from localmesh.rpc.identity import registry_policy
from localmesh.rpc.server import GrpcServer
from localmesh.store.errors import translated
from localmesh.store.mesh import MeshStore
from localmesh.store.mirror import Mirror
from localmesh.v1 import registry_service_pb2_grpc

_LOG = logging.getLogger(__name__)
_PAUSE_SECONDS = 0.5


@asynccontextmanager
async def serve(config: Config) -> AsyncIterator[Ready]:
    """Run a registry while the block runs.

    Raises:
        MeshError: It cannot start.
    """
    clock = SystemClock()
    own = config.registry
    server = GrpcServer(
        server_config(config, listen=own.listen, advertise=own.advertise),
        name="registry",
        identity_policy=registry_policy(config.mesh),
    )
    folder = DesiredFolder(own.desired_dir) if own.desired_dir is not None else None
    refill: Refill | None = None
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_store(config, clock))
        mirror = Mirror(store)
        keeping = [mirror.run()]
        if folder is not None:
            refill = Refill(store, folder)
            await refill.ensure()
            keeping.append(refill.run())
        await stack.enter_async_context(beside(*keeping))
        await mirror.loaded()
        settings = RegistryConfig(auto_approve=own.approve == "auto", join_token=own.join_token)
        before = refill.ensure if refill is not None else None
        servicer = RegistryServicer(store, mirror, settings, clock, folder=folder, before_register=before)
        server.add(registry_service_pb2_grpc.add_RegistryServiceServicer_to_server, servicer, SERVICE)
        await server.start()
        try:
            join_token = ""
            if own.enrolment_listen:
                letting_in = enrolment.listener(config, mirror, [server.endpoint], clock)
                join_token = str(await stack.enter_async_context(letting_in))
            yield Ready(endpoint=server.endpoint, port=server.port, join_token=join_token)
        finally:
            servicer.close()
            await server.stop()


class Refill:
    """Keeps a store that may be replaced by an empty one filled with what a folder holds."""

    def __init__(self, store: MeshStore, folder: DesiredFolder) -> None:
        self._store = store
        self._folder = folder
        self._filled = 0
        self._one_at_a_time = asyncio.Lock()

    async def ensure(self) -> None:
        """Fill the store unless this very cluster was filled before.

        Raises:
            MeshError: It cannot be filled.
        """
        async with self._one_at_a_time:
            with translated():
                cluster = (await self._store.etcd.status()).cluster_id
            if cluster == self._filled:
                return
            await self._store.check_schema()
            count = await fill_from_folder(self._store, self._folder)
            self._filled = cluster
            _LOG.info("%d models and approvals were put into the store", count)

    async def run(self) -> None:
        """Fill the store whenever another one has taken its place. Runs until cancelled."""
        while True:
            try:
                await self.ensure()
                async with self._store.etcd.watch(self._store.keys.schema()) as watcher:
                    async for _ in watcher:
                        continue
            except StoreReset as reset:
                _LOG.warning("etcd starts anew: %s", reset)
                continue
            except (MeshError, EtcdError) as error:
                _LOG.info("etcd cannot be watched at present: %s", error)
            await asyncio.sleep(_PAUSE_SECONDS)
