"""Who is let in: the replica's last word on every request, said before any work is done."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from localmesh.core.errors import ModelLoading, ReplicaDraining, ReplicaFull, ReplicaStale
from localmesh.core.ids import ReplicaId
from localmesh.rpc.metadata import MODEL, REPLICA, REVISION, first

_FULL_RETRY_SECONDS = 0.1
_LOADING_RETRY_SECONDS = 1.0

Metadata = Iterable[tuple[str, str | bytes]]


class Admission:
    """Counts the requests that run, and refuses those that must not.

    A refusal is always safe to retry elsewhere: nothing was done. What was let in is finished.
    """

    def __init__(self, replica: ReplicaId, revision: str, limit: int) -> None:
        self._replica = replica
        self._expected = {MODEL: replica.model, REPLICA: str(replica), REVISION: revision}
        self._limit = limit
        self._in_flight = 0
        self._open = False
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._on_change: Callable[[], None] | None = None

    @property
    def replica(self) -> ReplicaId:
        """Who refuses."""
        return self._replica

    @property
    def limit(self) -> int:
        """Requests that may run at once."""
        return self._limit

    @property
    def in_flight(self) -> int:
        """Requests that run now."""
        return self._in_flight

    def on_change(self, callback: Callable[[], None]) -> None:
        """Have somebody called after each change of the number of requests."""
        self._on_change = callback

    def open(self) -> None:
        """Let requests in from now on: the model is loaded."""
        self._open = True

    def drain(self) -> None:
        """Let nobody in from now on."""
        self._draining = True

    async def idle(self) -> None:
        """Return when no request runs."""
        await self._idle.wait()

    def check(self, metadata: Metadata | None) -> None:
        """Check that a request is meant for this replica as it is loaded. What it does not say is not checked.

        Raises:
            ReplicaStale: It was picked for another replica, revision or model.
        """
        for key, expected in self._expected.items():
            meant = first(metadata, key)
            if meant and meant != expected:
                raise ReplicaStale(
                    f"the request was picked for another replica: its {key} is {meant!r:.200}, this is {expected!r}.",
                    replica=self._replica,
                )

    def check_model(self, model: str) -> None:
        """Check the model that a request names in its own message; empty is no word about it.

        Raises:
            ReplicaStale: It is another one.
        """
        if model and model != self._replica.model:
            raise ReplicaStale(
                f"the request is for the model {model!r:.200}, this replica has {self._replica.model!r}.",
                replica=self._replica,
            )

    def check_open(self, metadata: Metadata | None) -> None:
        """Check that a request is meant for this replica, and that the model is loaded.

        Raises:
            ReplicaStale: It was meant for another one.
            ModelLoading: The model is not loaded yet.
        """
        self.check(metadata)
        if not self._open:
            raise ModelLoading(
                f"the replica {self._replica} is still loading.",
                retry_after_seconds=_LOADING_RETRY_SECONDS,
                model=self._replica.model,
                state="LOADING",
            )

    @contextmanager
    def admit(self, metadata: Metadata | None) -> Iterator[None]:
        """Let a request in, and count it until the context is left.

        Raises:
            ReplicaStale: It was meant for another one.
            ModelLoading: The model is not loaded yet.
            ReplicaDraining: The replica stops.
            ReplicaFull: As many as may are running.
        """
        self.check_open(metadata)
        if self._draining:
            raise ReplicaDraining(f"the replica {self._replica} stops.", replica=self._replica)
        if self._in_flight >= self._limit:
            raise ReplicaFull(
                f"the replica {self._replica} runs {self._limit} requests, as many as it may.",
                retry_after_seconds=_FULL_RETRY_SECONDS,
                replica=self._replica,
                limit=self._limit,
            )
        self._count(+1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self._in_flight += change
        if self._in_flight:
            self._idle.clear()
        else:
            self._idle.set()
        if self._on_change is not None:
            self._on_change()
