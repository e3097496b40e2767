"""What operators do to nodes (T5). Each call says what shall be so; saying it again changes nothing."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from localmesh.core.budgets import EVERY_DEVICE, budget_bytes
from localmesh.core.clock import Clock
from localmesh.core.errors import InvalidRequest, NodeNotFound
from localmesh.core.ids import NodeName
from localmesh.core.labels import NODE_NAME, REPLICA_SLOTS
from localmesh.core.records import ApprovalRecord
from localmesh.registry.approvals import Approvals
from localmesh.registry.config import RegistryConfig
from localmesh.registry.facts import checked_labels, label_name
from localmesh.registry.written import Predicate, shown
from localmesh.rpc.convert import node_name_of, node_to_proto
from localmesh.store.keys import device_id
from localmesh.store.mirror import Mirror
from localmesh.v1 import registry_service_pb2 as pb
from localmesh.v1 import types_pb2

logger = logging.getLogger(__name__)

_MAX_SLOTS: Final = 10_000
_MIRRORS: Final = (NODE_NAME, REPLICA_SLOTS)
"""Labels that repeat what is so: an operator changes that, not the label."""

Change = Callable[[ApprovalRecord], ApprovalRecord]


class Oversight:
    """The calls of operators about nodes."""

    def __init__(self, *, approvals: Approvals, mirror: Mirror, config: RegistryConfig, clock: Clock) -> None:
        self._approvals = approvals
        self._mirror = mirror
        self._config = config
        self._clock = clock

    async def approve(self, request: pb.ApproveNodeRequest) -> pb.ApproveNodeResponse:
        """Let a node in, and bind its name to its key.

        Raises:
            InvalidRequest: The name or the fingerprint cannot be one, or the node waits with another key.
            NodeNotFound: It has never come, and no key is given.
            Conflict: Others changed it all the time.
            InternalError: The change could not be kept in the folder of desired state.
            StoreUnavailable: etcd does not answer.
        """
        node, key = node_name_of(request.node), _fingerprint(request.key_fingerprint)

        def edit(known: ApprovalRecord | None) -> ApprovalRecord:
            if known is None and not key:
                raise _not_found(node)
            bound = known.key_fingerprint if known is not None else ""
            if key and bound and bound != key:
                raise InvalidRequest(
                    f"the node {node} has the key {bound}, not the one named: another machine asks for its name",
                    field="key_fingerprint",
                )
            if not (key or bound):
                raise InvalidRequest(f"nobody has shown a key for {node} yet: name it", field="key_fingerprint")
            return replace(known or ApprovalRecord(key_fingerprint=key), approved=True, key_fingerprint=key or bound)

        return pb.ApproveNodeResponse(node=await self._edited(node, edit, "approved"))

    async def cordon(self, request: pb.CordonNodeRequest) -> pb.CordonNodeResponse:
        """Keep what is new from a node. Raises: as approve()."""
        return pb.CordonNodeResponse(node=await self._changed(request.node, _set("cordoned", True), "cordoned"))

    async def uncordon(self, request: pb.UncordonNodeRequest) -> pb.UncordonNodeResponse:
        """End a cordon. Raises: as approve()."""
        return pb.UncordonNodeResponse(node=await self._changed(request.node, _set("cordoned", False), "uncordoned"))

    async def drain(self, request: pb.DrainNodeRequest) -> pb.DrainNodeResponse:
        """Empty a node; the reconciler moves and stops what is on it. Raises: as approve()."""
        shown_as = await self._changed(request.node, _set("draining", True), "drained")
        here = sum(1 for replica in self._mirror.snapshot.all_replicas() if replica.id.node == request.node)
        return pb.DrainNodeResponse(node=shown_as, replicas=here)

    async def resume(self, request: pb.ResumeNodeRequest) -> pb.ResumeNodeResponse:
        """End a drain. Raises: as approve()."""
        return pb.ResumeNodeResponse(node=await self._changed(request.node, _set("draining", False), "resumed"))

    async def set_labels(self, request: pb.SetNodeLabelsRequest) -> pb.SetNodeLabelsResponse:
        """Set and remove the operator's labels. Raises: as approve()."""
        wanted = checked_labels(request.set, "set")
        removed = frozenset(label_name(key, "remove") for key in request.remove)
        for key in _MIRRORS:
            if key in wanted:
                raise InvalidRequest(f"the label {key} follows from what the node is: it cannot be set", field="set")
        if both := removed & wanted.keys():
            raise InvalidRequest(f"the label {min(both)} is to be set and removed at once", field="remove")

        def change(known: ApprovalRecord) -> ApprovalRecord:
            kept = {key: value for key, value in known.labels.items() if key not in removed}
            return replace(known, labels=checked_labels({**kept, **wanted}, "set"))

        return pb.SetNodeLabelsResponse(node=await self._changed(request.node, change, "labelled"))

    async def set_overrides(self, request: pb.SetNodeOverridesRequest) -> pb.SetNodeOverridesResponse:
        """Say how much of a node may be used, in place of its worker. Raises: as approve()."""
        asked = request.overrides
        slots = asked.max_replicas_per_model
        if not 0 <= slots <= _MAX_SLOTS:
            raise InvalidRequest(
                f"max_replicas_per_model must be between 1 and {_MAX_SLOTS}, or 0 to leave it",
                field="overrides.max_replicas_per_model",
            )
        budgets = self._budgets(node_name_of(request.node), asked)
        if not slots and not budgets:
            raise InvalidRequest("there is nothing to override in the request", field="overrides")

        def change(known: ApprovalRecord) -> ApprovalRecord:
            return replace(
                known,
                max_replicas_per_model=slots or known.max_replicas_per_model,
                memory_budgets=MappingProxyType({**known.memory_budgets, **budgets}),
            )

        return pb.SetNodeOverridesResponse(node=await self._changed(request.node, change, "overridden"))

    async def reset_overrides(self, request: pb.ResetNodeOverridesRequest) -> pb.ResetNodeOverridesResponse:
        """Take overrides back. Raises: as approve()."""
        everything = not request.max_replicas_per_model and not request.memory_budgets

        def change(known: ApprovalRecord) -> ApprovalRecord:
            if everything or request.max_replicas_per_model:
                known = replace(known, max_replicas_per_model=0)
            if everything or request.memory_budgets:
                known = replace(known, memory_budgets=MappingProxyType({}))
            return known

        return pb.ResetNodeOverridesResponse(node=await self._changed(request.node, change, "left to its worker"))

    async def remove(self, request: pb.RemoveNodeRequest) -> pb.RemoveNodeResponse:
        """Forget a node.

        Raises:
            InvalidRequest: The name cannot be one.
            NodeNotFound: Nothing is known of it.
            NodeInUse: It has replicas, and it is not forced.
            Conflict: Others changed it all the time.
            InternalError: The change could not be kept in the folder of desired state.
            StoreUnavailable: etcd does not answer.
        """
        node = node_name_of(request.node)
        gone = await self._approvals.forget(node, force=request.force)
        await self._shown(lambda snapshot: snapshot.revision >= gone.revision)
        logger.info("%s was removed with %d replicas", node, len(gone.replicas))
        return pb.RemoveNodeResponse(replicas=len(gone.replicas))

    def _budgets(self, node: NodeName, asked: types_pb2.NodeOverrides) -> Mapping[str, str]:
        known = self._mirror.snapshot.devices.get(node, {})
        for name, text in asked.memory_budgets.items():
            try:
                budget_bytes(text, total_bytes=0)
                unknown = name != EVERY_DEVICE and bool(known) and device_id(name) not in known
            except ValueError as problem:
                raise InvalidRequest(str(problem), field="overrides.memory_budgets") from None
            if unknown:
                raise InvalidRequest(
                    f"the node {node} has no device {name!r}, but {', '.join(sorted(known))}",
                    field="overrides.memory_budgets",
                )
        return {name: text.strip() for name, text in asked.memory_budgets.items()}

    async def _changed(self, name: str, change: Change, what: str) -> types_pb2.Node:
        """Change what is said of a node that something is known of."""
        node = node_name_of(name)

        def edit(known: ApprovalRecord | None) -> ApprovalRecord:
            if known is None:
                raise _not_found(node)
            return change(known)

        return await self._edited(node, edit, what)

    async def _edited(
        self, node: NodeName, edit: Callable[[ApprovalRecord | None], ApprovalRecord], what: str
    ) -> types_pb2.Node:
        approval = await self._approvals.edit(node, edit)
        await self._shown(lambda snapshot: snapshot.revision >= approval.mod_revision)
        logger.info("%s was %s", node, what)
        return node_to_proto(self._mirror.snapshot, node)

    async def _shown(self, predicate: Predicate) -> None:
        await shown(self._mirror, predicate, within_seconds=self._config.write_seen_seconds, clock=self._clock)


def _set(flag: str, value: bool) -> Change:
    def change(known: ApprovalRecord) -> ApprovalRecord:
        return replace(known, **{flag: value})  # type: ignore[arg-type]  # one of the flags

    return change


def _fingerprint(text: str) -> str:
    """Return a key's fingerprint, or an empty string where none is given.

    Raises:
        InvalidRequest: It cannot be one.
    """
    lowered = text.strip().lower()
    if lowered and (len(lowered) != 64 or not set(lowered) <= set("0123456789abcdef")):
        raise InvalidRequest("key_fingerprint is 64 hexadecimal digits", field="key_fingerprint")
    return lowered


def _not_found(node: NodeName) -> NodeNotFound:
    return NodeNotFound(f"there is no node {node!r}. `localmesh nodes` lists those that there are.", node=node)
