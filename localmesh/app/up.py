"""`localmesh up`: the whole mesh in the foreground, until Ctrl-C."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from localmesh.app import component
from localmesh.app.config import Config
from localmesh.app.household import Household
from localmesh.rpc.errors import ConfigError


def run(config: Config, *, say: Callable[[str], None]) -> int:
    """Run the mesh until SIGINT or SIGTERM.

    Args:
        config: What to run.
        say: Told, line by line, what runs where and what can be done with it.

    Returns:
        0 after a stop that was asked for.

    Raises:
        StartFailed: Something does not start; nothing is left behind.
        ConfigError: It cannot run as it is configured.
    """
    if config.tls.cert is not None:
        raise ConfigError(
            "`up` uses no certificates that it is given (tls.cert, LOCALMESH_TLS_CERT): with --listen it makes its own."
            " With those of your own CA, start `localmesh registry`, `router` and `worker`, each with its own.",
            field="tls",
        )
    # What an operator should know is said; each component's own log is in a file.
    component.set_up_logging("error" if config.log_level == "info" else config.log_level)
    asyncio.run(component.until_signalled(_run(config, say)))
    say("stopped")
    return 0


async def _run(config: Config, say: Callable[[str], None]) -> None:
    household = Household(config, say=say)
    async with household:
        for line in describe(household):
            say(line)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            say("stopping")
            raise


def describe(household: Household) -> list[str]:
    """Return what runs where and what to do next, for a person."""
    lines = [f"mesh {household.config.mesh} is up", ""]
    if household.etcd is not None:
        binary = household.etcd.binary
        kept = f"data in {household.config.etcd_folder}" if household.etcd.durable else "data is thrown away at the end"
        lines.append(f"  {'etcd':<10} {household.etcd.endpoint:<22} {binary.version}, {kept}")
    else:
        lines.append(f"  {'etcd':<10} {', '.join(household.etcd_endpoints)}")
    for child in household.children:
        if child.address is not None:
            detail = f"node {child.spec.config.worker.name}" if child.spec.role == "worker" else ""
            lines.append(f"  {child.spec.name:<10} {child.address.endpoint:<22} {detail}".rstrip())
    lines += ["", f"models' files are looked for in {household.config.models_folder}"]
    lines += [f"logs are in {_short(household.log_dir)}", ""]
    if household.join_line:
        lines += ["to make another machine a node, run there:", f"  {household.join_line}", ""]
    lines += ["in another terminal: localmesh apply -f MODEL.yaml; localmesh generate MODEL 'Once upon a time'"]
    lines += ["Ctrl-C stops all of it"]
    return lines


def _short(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
