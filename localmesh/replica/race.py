"""Waiting for the first of several things."""

import asyncio
from collections.abc import Coroutine
from typing import Any


async def first_of(*waits: Coroutine[Any, Any, Any]) -> int:
    """Run all until the first ends, cancel the others, and return the place of the one that ended first.

    Raises:
        BaseException: What the first one raised.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(wait) for wait in waits]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
    except BaseExceptionGroup as raised:
        raise raised.exceptions[0] from None
    return min(tasks.index(task) for task in done)
