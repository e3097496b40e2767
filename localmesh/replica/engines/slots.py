"""How many calls a foreign backend is given at once."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from localmesh.core.clock import Clock

_LEFT_ALONE = (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


@dataclass(slots=True)
class SlotUse:
    """One use of a slot."""

    abandoned: bool
    timed_out: bool = False
    """To be set by whoever saw the call time out without an exception."""


class Slots:
    """Hands out the right to call.

    A foreign backend goes on computing for a caller that has left (most do). So the slot of a call that was abandoned
    stays taken until the backend answers `probe`; if that takes longer than it may, `hung` is set.
    """

    def __init__(
        self, count: int, *, probe: Callable[[float], Any], hang_seconds: float, hung: asyncio.Event, clock: Clock
    ) -> None:
        """Begin.

        Args:
            count: Calls at once.
            probe: Starts a call that is answered when the backend is free, with a time-out in seconds; returns the
                grpc.aio call object.
            hang_seconds: How long a probe may take.
            hung: Set when one took longer.
            clock: The time.
        """
        self._free = asyncio.Semaphore(count)
        self._probe = probe
        self._hang_seconds = hang_seconds
        self._hung = hung
        self._clock = clock
        self._probes: set[Any] = set()

    @asynccontextmanager
    async def taken(self) -> AsyncIterator["SlotUse"]:
        """Wait for a slot and hold it until the context is left."""
        await self._free.acquire()
        use = SlotUse(abandoned=True)
        try:
            yield use
            use.abandoned = use.timed_out
        except grpc.aio.AioRpcError as error:
            use.abandoned = error.code() in _LEFT_ALONE
            raise
        finally:
            if use.abandoned:
                self._release_when_answered()
            else:
                self._free.release()

    def _release_when_answered(self) -> None:
        latest = self._clock.monotonic() + self._hang_seconds
        probe = self._probe(self._hang_seconds)
        self._probes.add(probe)  # nobody else holds it, and grpc cancels a call that nobody holds

        def answered(_: Any) -> None:
            self._probes.discard(probe)
            self._free.release()
            if self._clock.monotonic() >= latest:
                self._hung.set()

        probe.add_done_callback(answered)
