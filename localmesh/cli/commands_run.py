"""Commands that run components. What they need is imported when they run: the other commands must start quickly."""

from localmesh import __version__
from localmesh.app.exits import Exit
from localmesh.cli import output
from localmesh.cli.connection import Command


def run_component(command: Command) -> int:
    """`registry`, `router`, `worker`: one component in the foreground."""
    from localmesh.app import component

    component.refuse_other_systems()
    return component.run(command.arguments.command, command.config, say=output.say)


def run_up(command: Command) -> int:
    """`up`: the whole mesh in the foreground."""
    from localmesh.app.component import refuse_other_systems

    refuse_other_systems()  # before modules are imported that other systems do not have
    from localmesh.app import up

    return up.run(command.config, say=output.say)


def run_demo(command: Command) -> int:
    """`demo`: an ephemeral mesh that shows itself."""
    from localmesh.app.component import refuse_other_systems

    refuse_other_systems()
    from localmesh.cli import demo

    return demo.run(command.config, say=output.say)


def version(command: Command) -> int:
    """`version`: which one this is."""
    if command.json:
        output.print_document({"version": __version__})
    else:
        output.write_line(f"localmesh {__version__}")
    return Exit.OK
