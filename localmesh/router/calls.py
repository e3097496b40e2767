"""Where a forwarded call goes: the router's side of localmesh.rpc.proxy."""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from localmesh.balancing import Fate, RetryPolicy
from localmesh.core.clock import Clock
from localmesh.core.records import ReplicaRecord
from localmesh.router.dispatch import Dispatcher
from localmesh.router.naming import model_of
from localmesh.router.routing import RouteSession, Routing
from localmesh.rpc.channels import ChannelPool
from localmesh.rpc.identity import server_name
from localmesh.rpc.metadata import MODEL, REPLICA, REVISION, first
from localmesh.rpc.proxy import Failure, ProxyCall, Target, kinds_of
from localmesh.thirdparty import backend_pb2
from localmesh.v1 import inference_service_pb2

logger = logging.getLogger(__name__)


def known_kinds() -> Mapping[str, tuple[bool, bool]]:
    """Return the kinds of the methods that replicas are known to have."""
    return kinds_of(
        [
            inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"],
            backend_pb2.DESCRIPTOR.services_by_name["Backend"],
        ]
    )


class CallRouter:
    """Finds the target of each call, and learns from how it went there."""

    def __init__(
        self, *, routing: Routing, dispatcher: Dispatcher, channels: ChannelPool, retry: RetryPolicy, clock: Clock
    ) -> None:
        self._routing = routing
        self._dispatcher = dispatcher
        self._channels = channels
        self._retry = retry
        self._clock = clock

    @asynccontextmanager
    async def route(self, call: ProxyCall) -> AsyncIterator[Target]:
        """Yield where the call goes now. The replica is locked, and the request counted on it, until the call leaves.

        Raises:
            MeshError: As `model_of` and `Routing.replica`.
        """
        session = call.state
        if not isinstance(session, RouteSession):
            model = model_of(call.method, first(call.metadata, MODEL), call.first_message or b"")
            session = call.state = self._routing.session(model, call.deadline)
        async with self._routing.replica(session) as replica:

            def on_failure(failure: Failure) -> bool:
                return self._learn(session, replica, failure)

            yield Target(
                channel=self._channels.get(replica.endpoint, server_name=server_name("node", replica.id.node)),
                extra_metadata=(
                    (MODEL, replica.id.model),
                    (REPLICA, str(replica.id)),
                    (REVISION, replica.revision),
                ),
                name=str(replica.id),
                on_failure=on_failure,
            )

    def _learn(self, session: RouteSession, replica: ReplicaRecord, failure: Failure) -> bool:
        attempts = session.attempts
        attempts.lost += failure.lost
        verdict = self._retry.judge(
            lost=failure.lost,
            refusal=failure.error,
            attempt=attempts.lost,
            answered=failure.answered,
            replayable=failure.replayable,
        )
        if verdict.fate is Fate.EJECT:
            logger.info("not picking %s for %.0f s: %s", replica.id, verdict.eject_seconds, failure.error)
            self._dispatcher.eject(replica, seconds=verdict.eject_seconds)
        elif verdict.fate is Fate.AVOID:
            attempts.refused_by(replica.id, self._clock.monotonic())
        return verdict.retry
