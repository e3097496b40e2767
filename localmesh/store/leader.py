"""Who reconciles: an election on the key `leader`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from localmesh.core.errors import MeshError
from localmesh.etcd import Election, EtcdError, Leadership, LeaseSession
from localmesh.etcd.tasks import until_one_ends
from localmesh.store.access import StoreAccess

logger = logging.getLogger(__name__)

_PAUSE_SECONDS = 0.5


class LeaderElection:
    """One candidate. At most one leads at a time, as far as transactions that compare its Leadership are concerned."""

    def __init__(self, store: StoreAccess, name: str, *, ttl_seconds: int = 5) -> None:
        """Prepare a candidate.

        Args:
            store: The mesh.
            name: Who it is, for people: it becomes `Snapshot.leader`.
            ttl_seconds: After this long without a sign of life somebody else is elected.
        """
        self._store = store
        self._name = name
        self._ttl_seconds = ttl_seconds
        self._leadership: Leadership | None = None

    @property
    def leadership(self) -> Leadership | None:
        """The proof, while this candidate leads."""
        return self._leadership

    async def run(self, lead: Callable[[Leadership], Awaitable[None]]) -> None:
        """Stand for election until cancelled.

        While elected, `lead` runs. It is cancelled as soon as the lease must not be relied on any more. When it
        returns, or raises a MeshError (which is logged), the candidate steps down and stands again; any other
        exception of it is raised.
        """
        while True:
            try:
                async with self._store.etcd.session(self._ttl_seconds) as session:
                    await self._once(session, lead)
            except (EtcdError, MeshError) as error:
                logger.info("%s does not lead: %s", self._name, error)
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _once(self, session: LeaseSession, lead: Callable[[Leadership], Awaitable[None]]) -> None:
        election = Election(self._store.etcd)
        leadership = await election.campaign(self._store.keys.leader(), self._name, session)
        logger.info("%s leads the mesh %s", self._name, self._store.keys.mesh)

        async def run() -> None:
            await lead(leadership)

        async def lost() -> None:
            await session.lost.wait()

        self._leadership = leadership
        try:
            await until_one_ends(run(), lost())
        finally:
            self._leadership = None
