"""Reading one's own writes: an answer waits until the mirror shows what it says."""

import logging
from collections.abc import Callable

from localmesh.core.clock import Clock
from localmesh.core.snapshot import Snapshot
from localmesh.store.mirror import Mirror

logger = logging.getLogger(__name__)

Predicate = Callable[[Snapshot], bool]


async def shown(mirror: Mirror, predicate: Predicate, *, within_seconds: float, clock: Clock) -> bool:
    """Wait until the mirror's snapshot satisfies a predicate, but not for ever: the write itself is done.

    Returns:
        Whether it does.
    """
    try:
        return await mirror.wait_for(lambda snapshot: predicate(snapshot) or None, clock.monotonic() + within_seconds)
    except TimeoutError:
        logger.info("the mirror did not show within %.1f s what was waited for", within_seconds)
        return False
