"""Nodes: how workers register and leave, and what the mesh says of them."""

import asyncio
import logging
from collections.abc import AsyncIterator

from google.protobuf.duration_pb2 import Duration

from localmesh.core.clock import Clock
from localmesh.core.errors import (
    IncarnationLost,
    InvalidRequest,
    JoinTokenInvalid,
    NodeNameTaken,
    NodePending,
    PermissionDenied,
    StoreUnavailable,
)
from localmesh.core.ids import NodeName
from localmesh.core.records import NodeRecord
from localmesh.core.snapshot import Snapshot
from localmesh.registry import facts
from localmesh.registry.approvals import Approvals
from localmesh.registry.config import RegistryConfig
from localmesh.registry.heartbeat import Send, Surroundings, WorkerStream
from localmesh.registry.written import Predicate, shown
from localmesh.rpc.convert import node_name_of, node_names, node_to_proto, replica_ref
from localmesh.rpc.identity import Identity, require_node, same_secret
from localmesh.rpc.paging import page
from localmesh.store.mesh import MeshStore
from localmesh.store.mirror import Mirror
from localmesh.v1 import registry_service_pb2 as pb

logger = logging.getLogger(__name__)

_FIRST_MESSAGE_SECONDS = 10.0


class Nodes:
    """The calls of workers, and the list of nodes."""

    def __init__(
        self, *, store: MeshStore, mirror: Mirror, config: RegistryConfig, clock: Clock, approvals: Approvals
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._config = config
        self._clock = clock
        self._approvals = approvals

    async def register(self, request: pb.RegisterRequest, identity: Identity | None) -> pb.RegisterResponse:
        """Make a worker a node (T0).

        Args:
            request: What the worker sent.
            identity: That of its certificate; None without TLS.

        Raises:
            InvalidRequest: A field is not acceptable.
            PermissionDenied: The certificate is another node's, or of another key.
            JoinTokenInvalid: It has shown a token, and that is not the mesh's.
            NodePending: Nobody has approved the node.
            NodeNameTaken: The name belongs to another key.
            StoreUnavailable: etcd does not answer.
        """
        require_node(identity, request.node)
        fingerprint = facts.fingerprint_of(request.public_key)
        if identity is not None and identity.key_fingerprint != fingerprint:
            raise PermissionDenied(f"public_key is not that of the certificate of {identity}", identity=str(identity))
        asked = facts.registration(
            request,
            fingerprint=fingerprint,
            auto_approve=self._config.auto_approve and not self._config.join_token,
            budget_part=self._config.budget_part,
            vouched=self._vouched(request, fingerprint),
            remember=self._may_remember(),
        )
        try:
            registered = await self._store.register(asked, self._config.leases)
        except NodeNameTaken:
            logger.warning("somebody with the key %s wanted to be the node %s", fingerprint[:16], asked.node)
            raise
        except NodePending:
            logger.info("the node %s with the key %s waits for approval", asked.node, fingerprint[:16])
            raise
        await self._shown(lambda snapshot: _present(snapshot, asked.node, registered.incarnation) is not None)
        await self._approvals.keep(asked.node)
        logger.info(
            "%s registered as incarnation %x: %d adopted, %d to stop",
            asked.node,
            registered.incarnation,
            len(registered.adopted),
            len(registered.stop),
        )
        ttl = Duration()
        ttl.FromMicroseconds(int(registered.presence_ttl_seconds * 1e6))
        return pb.RegisterResponse(
            incarnation=registered.incarnation,
            presence_ttl=ttl,
            adopted=[replica_ref(replica) for replica in registered.adopted],
            stop=[replica_ref(replica) for replica in registered.stop],
        )

    async def deregister(self, request: pb.DeregisterRequest, identity: Identity | None) -> pb.DeregisterResponse:
        """End a registration.

        Raises:
            InvalidRequest: The name cannot be one.
            PermissionDenied: The certificate is another node's.
            IncarnationLost: It has ended already.
            StoreUnavailable: etcd does not answer.
        """
        require_node(identity, request.node)
        node = node_name_of(request.node)
        await self._store.deregister(node, request.incarnation)
        await self._shown(lambda snapshot: _present(snapshot, node, request.incarnation) is None)
        logger.info("%s has left", node)
        return pb.DeregisterResponse()

    async def heartbeat(
        self,
        requests: AsyncIterator[pb.HeartbeatRequest],
        send: Send,
        identity: Identity | None,
        around: Surroundings,
    ) -> None:
        """Serve a worker's life line until it ends.

        Raises:
            InvalidRequest: The worker sent what it may not.
            PermissionDenied: The certificate is another node's.
            IncarnationLost: The registration has ended.
            StoreUnavailable: etcd does not answer.
        """
        try:
            async with asyncio.timeout(_FIRST_MESSAGE_SECONDS):
                first = await anext(requests, None)
        except TimeoutError:
            raise InvalidRequest("the stream's first message, with node and incarnation, did not come") from None
        if first is None:
            return
        require_node(identity, first.node)
        node = node_name_of(first.node)
        record = await self._registered(node, first.incarnation)
        await WorkerStream(around, record).run(first, requests, send)

    def list_nodes(self, request: pb.ListNodesRequest) -> pb.ListNodesResponse:
        """Return a page of nodes by name, those that are gone or pending included.

        Raises:
            InvalidRequest: Page size or token are not acceptable.
        """
        snapshot = self._mirror.snapshot
        found, token = page(node_names(snapshot), key=str, page_size=request.page_size, page_token=request.page_token)
        return pb.ListNodesResponse(nodes=[node_to_proto(snapshot, name) for name in found], next_page_token=token)

    async def _registered(self, node: NodeName, incarnation: int) -> NodeRecord:
        """Return the node's record; another registry may have made it a moment ago."""
        await shown(
            self._mirror,
            lambda snapshot: _present(snapshot, node, incarnation) is not None,
            within_seconds=self._config.registered_seen_seconds,
            clock=self._clock,
        )
        record = _present(self._mirror.snapshot, node, incarnation)
        if record is not None:
            return record
        if not self._mirror.connected:
            raise StoreUnavailable(
                "this registry does not hear from etcd, and cannot tell whether the registration holds. Ask another"
                " one, or again.",
                retry_after_seconds=1.0,
            )
        raise IncarnationLost(f"The registration of the node {node} has ended. Register again.", node=node)

    def _vouched(self, request: pb.RegisterRequest, fingerprint: str) -> bool:
        """Whether a newcomer shows the mesh's join token. Of a node that is approved nobody asks: tokens change.

        Raises:
            JoinTokenInvalid: It shows another one.
        """
        known = self._mirror.snapshot.approvals.get(NodeName(request.node))
        settled = known is not None and known.approved and known.key_fingerprint == fingerprint
        if not self._config.join_token or not request.join_token or settled:
            return False
        if not same_secret(request.join_token, self._config.join_token):
            raise JoinTokenInvalid("the join token is wrong: ask the operator of the mesh for the present one")
        return True

    def _may_remember(self) -> bool:
        pending = sum(1 for approval in self._mirror.snapshot.approvals.values() if not approval.approved)
        return pending < self._config.max_pending

    async def _shown(self, predicate: Predicate) -> bool:
        return await shown(self._mirror, predicate, within_seconds=self._config.write_seen_seconds, clock=self._clock)


def _present(snapshot: Snapshot, node: NodeName, incarnation: int) -> NodeRecord | None:
    record = snapshot.nodes.get(node)
    return record if record is not None and record.incarnation == incarnation else None
