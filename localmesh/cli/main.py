"""Runs one command: parse, read the configuration, do it, turn what went wrong into a sentence and an exit code."""

import asyncio
import logging
import os
import sys
import traceback
from collections.abc import Awaitable, Sequence
from typing import Any

from localmesh.app.children import StartFailed
from localmesh.app.config_reader import ConfigError, read
from localmesh.app.exits import Exit, exit_for
from localmesh.cli import output
from localmesh.cli.arguments import given_settings
from localmesh.cli.connection import Command
from localmesh.cli.hints import hint_for
from localmesh.cli.parser import build_parser
from localmesh.core.errors import MeshError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Nothing but --help and wrong usage leaves by SystemExit."""
    arguments = build_parser().parse_args(argv)
    as_json = False
    try:
        reading = read(given_settings(arguments), config_file=arguments.config, find_running=arguments.client)
        for note in reading.notes:
            output.write_error(note)
        logging.basicConfig(level=logging.CRITICAL if arguments.client else logging.WARNING, stream=sys.stderr)
        command = Command(arguments=arguments, config=reading.config)
        as_json = command.json
        code = _finish(arguments.handler(command))
        sys.stdout.flush()
        return code
    except (ConfigError, StartFailed) as problem:
        _trace(arguments.debug)
        output.write_error(str(problem))
        return problem.exit_code if isinstance(problem, StartFailed) else Exit.USAGE
    except MeshError as error:
        _trace(arguments.debug)
        code = exit_for(error)
        if as_json:
            output.write_error_document(error, code)
        else:
            # a component that cannot start has said what to do; the hints are for those who call one
            output.write_error(error.message, hint_for(error) if arguments.client else "")
        return code
    except BrokenPipeError:
        # Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.BROKEN_PIPE
    except (KeyboardInterrupt, asyncio.CancelledError):
        return Exit.INTERRUPTED
    except Exception as problem:  # noqa: BLE001 - the edge: a person gets a sentence, --debug the traceback
        _trace(arguments.debug)
        again = "" if arguments.debug else " Run it again with --debug for a traceback."
        output.write_error(f"a fault of localmesh: {type(problem).__name__}: {problem}.{again}")
        return Exit.FAILURE


def _finish(result: int | Awaitable[int]) -> int:
    if isinstance(result, int):
        return result

    async def run(work: Awaitable[int]) -> int:
        return await work

    return asyncio.run(run(result))


def _trace(debug: Any) -> None:
    if debug:
        traceback.print_exc()
