"""What operators say of nodes, kept: in the store and, beside one that does not survive, in the folder."""

import asyncio
from dataclasses import dataclass, field

from localmesh.core.ids import NodeName
from localmesh.core.records import ApprovalRecord
from localmesh.registry.desired_folder import DesiredFolder
from localmesh.store.mesh import MeshStore
from localmesh.store.oversight import Edit, Forgotten


@dataclass(frozen=True, slots=True, kw_only=True)
class Approvals:
    """The one way by which a registry changes approvals. What it returns from is written, in both places."""

    store: MeshStore
    folder: DesiredFolder | None
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Store and folder must see changes in the same order."""

    async def edit(self, node: NodeName, edit: Edit) -> ApprovalRecord:
        """Change what is said of a node (T5); see Oversight.edit_approval for what it raises."""
        if self.folder is None:
            return await self.store.edit_approval(node, edit)
        async with self._one_at_a_time:
            approval = await self.store.edit_approval(node, edit)
            await self.folder.in_order(self.folder.save_approval, node, approval)
            return approval

    async def forget(self, node: NodeName, *, force: bool) -> Forgotten:
        """Forget a node; see Oversight.forget_node for what it returns and raises."""
        if self.folder is None:
            return await self.store.forget_node(node, force=force)
        async with self._one_at_a_time:
            gone = await self.store.forget_node(node, force=force)
            await self.folder.in_order(self.folder.remove_approval, node)
            return gone

    async def keep(self, node: NodeName) -> None:
        """Keep what the store says of a node now: a registration may have bound its name to a key."""
        if self.folder is None:
            return
        async with self._one_at_a_time:
            approval = await self.store.read_approval(node)
            if approval is not None:
                await self.folder.in_order(self.folder.save_approval, node, approval)
