"""Runs one component in this process: signals, logging, the ready line, and failures as one sentence."""

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

from localmesh.app.config import Config
from localmesh.app.exits import exit_for
from localmesh.app.lifeline import Failed, Ready, StatusPipe
from localmesh.core.errors import MeshError
from localmesh.rpc.errors import ConfigError

Served = Callable[[Config], AbstractAsyncContextManager[Ready]]
"""What a component does: entered, it serves at the yielded address; left, it has stopped gracefully."""

ROLES = ("registry", "router", "worker")


def run(role: str, config: Config, *, say: Callable[[str], None], status: StatusPipe | None = None) -> int:
    """Run a component until SIGTERM or SIGINT.

    Args:
        role: registry, router or worker.
        config: Its configuration.
        say: Told where it serves, once it does.
        status: Told the same, or why it does not.

    Returns:
        0 after a stop that was asked for.

    Raises:
        MeshError: It cannot start, or cannot go on.
    """
    set_up_logging(config.log_level)
    pipe = status or StatusPipe(None)
    try:
        asyncio.run(_serve(role, config, say, pipe))
    except MeshError as error:
        _report(pipe, error)
        raise
    except BaseExceptionGroup as group:
        found = first_mesh_error(group)
        if found is None:
            raise
        _report(pipe, found)
        raise found from group
    return 0


def _report(pipe: StatusPipe, error: MeshError) -> None:
    pipe.send(Failed(message=error.message, exit_code=exit_for(error)))


def refuse_other_systems() -> None:
    """Refuse to run where the kernel cannot end a process with its parent.

    Raises:
        ConfigError: This is not Linux.
    """
    if sys.platform != "linux":
        raise ConfigError(
            f"localmesh runs components on Linux only, and this is {sys.platform}: a worker must be sure that the"
            " processes it starts end with it. Commands such as `localmesh generate` work from here with --router."
        )


def set_up_logging(level: str) -> None:
    """Log to stderr, one line a record."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )


async def _serve(role: str, config: Config, say: Callable[[str], None], status: StatusPipe) -> None:
    async def serve() -> None:
        async with _component(role)(config) as ready:
            status.send(ready)
            say(f"{role} serves at {ready.endpoint}" + (f" ({ready.detail})" if ready.detail else ""))
            if ready.join_token:
                say(f"to make another machine a node, run there: localmesh worker --join {ready.join_token}")
            await asyncio.Event().wait()

    await until_signalled(serve())


def _component(role: str) -> Served:
    # A process runs one of them: it need not wait for the modules of the others.
    match role:
        case "registry":
            from localmesh.app import registry

            return registry.serve
        case "router":
            from localmesh.app import router

            return router.serve
        case "worker":
            from localmesh.app import worker

            return worker.serve
    raise ValueError(f"no component is called {role!r}")


async def until_signalled(work: Coroutine[Any, Any, None]) -> None:
    """Run until the work ends, or cancel it, and wait for its end, at SIGTERM or SIGINT.

    A second signal has the system's own effect.
    """
    loop = asyncio.get_running_loop()
    signalled = asyncio.Event()
    task = asyncio.current_task()

    def stop() -> None:
        signalled.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        if task is not None:
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        await work
    except asyncio.CancelledError:
        if not signalled.is_set():
            raise
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def first_mesh_error(group: BaseExceptionGroup[BaseException]) -> MeshError | None:
    """Return the first MeshError in a group of failures, however deep: a TaskGroup wraps what is raised within it."""
    for error in group.exceptions:
        found = first_mesh_error(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(found, MeshError):
            return found
    return None
