"""RegistryService, put together: what each RPC does is in the module of its concern."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

from localmesh.core.clock import Clock
from localmesh.core.errors import Conflict
from localmesh.registry.approvals import Approvals
from localmesh.registry.config import RegistryConfig
from localmesh.registry.desired_folder import DesiredFolder
from localmesh.registry.heartbeat import Surroundings
from localmesh.registry.models import Models
from localmesh.registry.nodes import Nodes
from localmesh.registry.oversight import Oversight
from localmesh.registry.wanted import ViewCache
from localmesh.rpc.identity import peer_identity
from localmesh.store.mesh import MeshStore
from localmesh.store.mirror import Mirror
from localmesh.v1 import registry_service_pb2 as pb
from localmesh.v1.registry_service_pb2_grpc import RegistryServiceServicer

logger = logging.getLogger(__name__)

SERVICE: Final = "localmesh.v1.RegistryService"


class RegistryServicer(RegistryServiceServicer):
    """Serves RegistryService. Stateless: any number of registries serve one mesh.

    The store's schema is checked and the mirror runs before calls come in; `close` is called before the server stops.
    """

    def __init__(
        self,
        store: MeshStore,
        mirror: Mirror,
        config: RegistryConfig,
        clock: Clock,
        *,
        folder: DesiredFolder | None = None,
        before_register: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Prepare the service.

        Args:
            store: The mesh's store.
            mirror: A view of it; `run()` is the caller's.
            config: How to behave.
            clock: Where the time comes from.
            folder: Where desired state is kept beside a store that does not survive; None for a store that does.
            before_register: Awaited before a node is taken in. With a folder: makes sure that the store has what is in
                it, because what a worker runs is stopped when its model is not there.
        """
        self._models = Models(store=store, mirror=mirror, config=config, clock=clock, folder=folder)
        approvals = Approvals(store=store, folder=folder)
        self._nodes = Nodes(store=store, mirror=mirror, config=config, clock=clock, approvals=approvals)
        self._oversight = Oversight(approvals=approvals, mirror=mirror, config=config, clock=clock)
        self._before_register = before_register
        self._closing = asyncio.Event()
        self._around = Surroundings(
            store=store, mirror=mirror, views=ViewCache(), config=config, clock=clock, closing=self._closing
        )

    def close(self) -> None:
        """End the workers' streams, so that the server can stop at once; they go to another registry."""
        self._closing.set()

    async def ApplyModel(self, request: pb.ApplyModelRequest, context: Any) -> pb.ApplyModelResponse:  # noqa: ARG002
        """See the protocol."""
        return await self._models.apply(request)

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Any) -> pb.DeleteModelResponse:  # noqa: ARG002
        """See the protocol."""
        return await self._models.delete(request)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: ARG002
        """See the protocol."""
        return self._models.get(request)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:  # noqa: ARG002
        """See the protocol."""
        return self._models.list_models(request)

    async def ListNodes(self, request: pb.ListNodesRequest, context: Any) -> pb.ListNodesResponse:  # noqa: ARG002
        """See the protocol."""
        return self._nodes.list_nodes(request)

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: Any) -> pb.ListReplicasResponse:  # noqa: ARG002
        """See the protocol."""
        return self._models.list_replicas(request)

    async def ApproveNode(self, request: pb.ApproveNodeRequest, context: Any) -> pb.ApproveNodeResponse:  # noqa: ARG002
        """See the protocol."""
        return await self._oversight.approve(request)

    async def CordonNode(self, request: pb.CordonNodeRequest, context: Any) -> pb.CordonNodeResponse:  # noqa: ARG002
        """See the protocol."""
        return await self._oversight.cordon(request)

    async def UncordonNode(self, request: pb.UncordonNodeRequest, context: Any) -> pb.UncordonNodeResponse:  # noqa: ARG002
        """See the protocol."""
        return await self._oversight.uncordon(request)

    async def DrainNode(self, request: pb.DrainNodeRequest, context: Any) -> pb.DrainNodeResponse:  # noqa: ARG002
        """See the protocol."""
        return await self._oversight.drain(request)

    async def ResumeNode(self, request: pb.ResumeNodeRequest, context: Any) -> pb.ResumeNodeResponse:  # noqa: ARG002
        """See the protocol."""
        return await self._oversight.resume(request)

    async def RemoveNode(self, request: pb.RemoveNodeRequest, context: Any) -> pb.RemoveNodeResponse:  # noqa: ARG002
        """See the protocol."""
        return await self._oversight.remove(request)

    async def SetNodeLabels(self, request: pb.SetNodeLabelsRequest, context: Any) -> pb.SetNodeLabelsResponse:  # noqa: ARG002
        """See the protocol."""
        return await self._oversight.set_labels(request)

    async def SetNodeOverrides(self, request: pb.SetNodeOverridesRequest, context: Any) -> pb.SetNodeOverridesResponse:  # noqa: ARG002
        """See the protocol."""
        return await self._oversight.set_overrides(request)

    async def ResetNodeOverrides(
        self,
        request: pb.ResetNodeOverridesRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.ResetNodeOverridesResponse:
        """See the protocol."""
        return await self._oversight.reset_overrides(request)

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterResponse:
        """See the protocol."""
        if self._before_register is not None:
            await self._before_register()
        return await self._nodes.register(request, peer_identity(context))

    async def Heartbeat(self, request_iterator: AsyncIterator[pb.HeartbeatRequest], context: Any) -> None:
        """See the protocol."""
        await self._nodes.heartbeat(request_iterator, context.write, peer_identity(context), self._around)

    async def Deregister(self, request: pb.DeregisterRequest, context: Any) -> pb.DeregisterResponse:
        """See the protocol."""
        return await self._nodes.deregister(request, peer_identity(context))


async def fill_from_folder(store: MeshStore, folder: DesiredFolder) -> int:
    """Put the desired state of a folder into the store; what is there already stays as it is.

    Returns:
        How many models and approvals were put.

    Raises:
        InvalidSpec: A file is not acceptable; it is named.
        InternalError: The folder cannot be used.
        StoreUnavailable: etcd does not answer.
    """
    await folder.in_order(folder.open)
    approvals, models = await folder.in_order(folder.approvals), await folder.in_order(folder.models)
    present = await store.load()
    lost_approvals = [(node, approval) for node, approval in approvals if node not in present.approvals]
    lost_models = [(spec, policy) for spec, policy in models if spec.name not in present.models]
    for node, approval in lost_approvals:
        try:
            await store.put_approval(node, expected=None, new=approval)
        except Conflict:
            logger.info("somebody else said something of the node %s meanwhile", node)
    for spec, policy in lost_models:
        await store.put_model(spec, policy)
    return len(lost_approvals) + len(lost_models)
