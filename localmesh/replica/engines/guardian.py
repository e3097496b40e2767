"""Runs a foreign program so that nothing of it outlives the replica. A script for `python -I -S`.

It uses the standard library only:

    guardian.py REPLICA_PID PROGRAM ARGUMENT...

It leads a process group of its own with the program in it. When the replica is gone, however it went, it kills the
group; when the guardian itself is killed, the system kills the program. Apart from that it only waits: a SIGTERM to the
group is the program's business. Its exit code is the program's, 128 + N for signal N.
"""

import ctypes
import os
import signal
import sys
from types import FrameType

_PR_SET_PDEATHSIG = 1
_CANNOT_START = 127


def _tie(signum: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)


def main(replica: int, command: list[str]) -> int:
    """Run the command to its end and return its exit code."""

    def replica_may_be_gone(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler's signature
        if os.getppid() != replica:
            os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGTERM, replica_may_be_gone)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _tie(signal.SIGTERM)
    replica_may_be_gone(0, None)  # it may have gone before the tie held
    guardian = os.getpid()
    program = os.fork()
    if program == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _tie(signal.SIGKILL)
        if os.getppid() == guardian:
            try:
                os.execv(command[0], command)  # noqa: S606 - no shell is wanted
            except OSError as error:
                print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(_CANNOT_START)
    _, status = os.waitpid(program, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os._exit(main(int(sys.argv[1]), sys.argv[2:]))
