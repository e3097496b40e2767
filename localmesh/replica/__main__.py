"""python -m localmesh.replica --spec FILE --status-fd N: the process that a worker starts for each replica."""

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

from localmesh.core.clock import SystemClock
from localmesh.core.replica_process import FailedEvent, ReplicaSpecFile
from localmesh.replica.process import ReplicaProcess, die_with
from localmesh.replica.status import StatusWriter


async def _live(file: ReplicaSpecFile, status: StatusWriter) -> int:
    return await ReplicaProcess(file, status, SystemClock()).run()


def main() -> int:
    """Be a replica; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m localmesh.replica", description=__doc__)
    parser.add_argument("--spec", type=Path, required=True, help="file that the worker wrote")
    parser.add_argument("--status-fd", type=int, default=-1, help="file descriptor for status lines")
    arguments = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname).1s %(name)s: %(message)s", stream=sys.stderr
    )
    status = StatusWriter(arguments.status_fd)
    try:
        file = ReplicaSpecFile.from_json(arguments.spec.read_text())
    except (OSError, ValueError) as error:
        status.send(FailedEvent(reason="INVALID_SPEC", message=f"{arguments.spec}: {error}"))
        logging.getLogger("localmesh.replica").error("%s: %s", arguments.spec, error)
        return 1
    if not die_with(file.parent_pid):
        logging.getLogger("localmesh.replica").error("the worker (process %d) is gone", file.parent_pid)
        return 1
    return asyncio.run(_live(file, status))


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    # Not sys.exit: llama.cpp's threads are not waited for. There is nothing of theirs to save.
    os._exit(code)
