"""The store of a mesh: every write to etcd that localmesh makes, apart from those of a Holder, is a method of it."""

from __future__ import annotations

from localmesh.core.snapshot import Snapshot
from localmesh.etcd import RevisionCompactedError, prefix_end
from localmesh.store.builder import Complaints, SnapshotBuilder
from localmesh.store.desired import Desired
from localmesh.store.errors import translated, unavailable
from localmesh.store.guarding import Guarding
from localmesh.store.membership import Membership
from localmesh.store.oversight import Oversight
from localmesh.store.placement import Placing
from localmesh.store.report import Reporting
from localmesh.store.unload import Unloading

_PAGE_KEYS = 2000
_LOAD_TRIES = 3


class MeshStore(Membership, Placing, Unloading, Reporting, Desired, Oversight, Guarding):
    """All transactions of one mesh. Stateless, and safe for any number of tasks at once.

    Every method is one documented transaction and says what it compares, what it writes, and how
    an unknown outcome is settled. Every update of a leased key keeps its lease, and the fields of its value that this
    version does not know.
    """

    async def load(self) -> Snapshot:
        """Read the whole mesh as of one revision, in pages.

        Raises:
            StoreUnavailable: etcd does not answer.
        """
        return await self.load_with(Complaints())

    async def load_with(self, complaints: Complaints) -> Snapshot:
        """Do as load(), and complain of what cannot be read to somebody who remembers."""
        for _ in range(_LOAD_TRIES):
            try:
                return await self._load(complaints)
            except RevisionCompactedError:
                continue  # compacted while paging: begin again at the present revision
        raise unavailable("etcd compacts its history faster than the mesh can be read.")

    async def _load(self, complaints: Complaints) -> Snapshot:
        builder = SnapshotBuilder(Snapshot(), self.keys, complaints)
        start, end = self.keys.prefix, prefix_end(self.keys.prefix)
        revision = 0
        more = True
        while more:
            with translated():
                answer = await self.etcd.range(start, end, revision=revision, limit=_PAGE_KEYS)
            revision = revision or answer.revision
            for kv in answer.kvs:
                builder.put(kv)
            more = answer.more and bool(answer.kvs)
            if more:
                start = answer.kvs[-1].key + b"\0"
        return builder.build(revision)
