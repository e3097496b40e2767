"""A lock as etcd3 has it: one key, created if absent, on a lease that is kept alive while it is held."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING, Self

from localmesh.etcd.election import Election, Leadership
from localmesh.etcd.errors import EtcdError
from localmesh.etcd.lease import LeaseSession

if TYPE_CHECKING:
    from localmesh.etcd.client import EtcdClient


class Lock:
    """Excludes others from a name while its lease lives: check `is_held()`, or guard writes by the key."""

    def __init__(self, client: EtcdClient, key: bytes, ttl_seconds: int) -> None:
        self.key = key
        self._client = client
        self._ttl_seconds = ttl_seconds
        self._session: LeaseSession | None = None
        self._leadership: Leadership | None = None

    async def acquire(self, timeout: float | None = 10.0) -> bool:
        """Take the lock; return False if it is held by another for `timeout` seconds (None: wait for ever)."""
        if self._session is not None:
            raise EtcdError(f"{self.key!r} is already held by this object")
        session = self._client.session(self._ttl_seconds)
        await session.open()
        try:
            async with asyncio.timeout(timeout):
                self._leadership = await Election(self._client).campaign(self.key, "", session)
        except TimeoutError:
            await session.close()
            return False
        except BaseException:
            await session.close()
            raise
        self._session = session
        return True

    def is_held(self) -> bool:
        """Return whether the holder may act on the lock at this moment."""
        return self._session is not None and self._session.alive()

    async def release(self) -> bool:
        """Give the lock back; return whether it was still held."""
        session, self._session = self._session, None
        if session is None:
            return False
        held = session.alive()
        await session.close()
        return held

    async def __aenter__(self) -> Self:
        await self.acquire(timeout=None)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.release()
