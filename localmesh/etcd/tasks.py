"""Owners of asyncio tasks: nothing in this package runs without one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class TaskOwner:
    """Owns tasks that begin and end at different times, and outlive the task that opened the owner.

    A TaskGroup has to be left by the task that entered it, and cancels that task when a child fails; a client
    is opened and closed by whoever holds it and its background tasks report failures themselves.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def start(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run the coroutine until it ends or the owner is closed. An exception from it is a bug, and logged."""
        if self._closed:
            coroutine.close()
            raise RuntimeError(f"{name} started after its owner was closed")
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("task %s died", task.get_name(), exc_info=error)

    async def stop(self, task: asyncio.Task[None]) -> None:
        """Cancel one task and wait until it has ended."""
        task.cancel()
        await asyncio.wait([task])

    async def close(self) -> None:
        """Cancel everything and wait until it has ended. May be called twice."""
        self._closed = True
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def until_one_ends(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run all; when one returns or raises, cancel the others, and raise what it raised.

    Not a TaskGroup: that of Python 3.11 leaves its parent marked as being cancelled after a child has failed,
    which no later code can tell from a real cancellation.
    """
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ended = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    errors = [task.exception() for task in ended + tasks if not task.cancelled()]
    for error in errors:
        if error is not None:
            raise error
