"""A stand-in for `python -m localmesh.replica`, run by tests as a program: speaks the status contract, serves nothing.

The spec's option "behave" says what it does.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from localmesh.core.replica_process import (
    FailedEvent,
    ListeningEvent,
    LoadEvent,
    PhaseEvent,
    ReadyEvent,
    ReplicaSpecFile,
    StatusEvent,
    status_to_json,
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", required=True)
    parser.add_argument("--status-fd", type=int, required=True)
    arguments = parser.parse_args()
    spec = ReplicaSpecFile.from_json(Path(arguments.spec).read_text())
    options = spec.spec.options

    def say(event: StatusEvent) -> None:
        os.write(arguments.status_fd, status_to_json(event).encode() + b"\n")

    # what a real one does, so that no test leaves it behind
    threading.Thread(target=_end_with_parent, args=(spec.parent_pid,), daemon=True).start()
    behave = options.get("behave", "ready")
    print("starting", spec.replica, flush=True)
    if behave == "crash":
        print("Traceback: the engine is missing a nose", file=sys.stderr, flush=True)
        raise SystemExit(3)
    if behave == "hang":
        signal.pause()
    if behave == "fail":
        say(FailedEvent(reason="LOAD_FAILED", message="the file is made of cheese"))
        signal.pause()
    if behave == "grandchild":
        # keeps output and status pipe open, in a session of its own
        child = subprocess.Popen(
            [sys.executable, "-c", "import signal; signal.pause()"],
            pass_fds=(arguments.status_fd,),
            start_new_session=options.get("session") == "own",
        )
        print("grandchild", child.pid, flush=True)
    if behave == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behave == "garbage":
        os.write(arguments.status_fd, b"this is no JSON\n" + b"x" * 200_000 + b"\n{}\n")
    if "environment" in options:
        for name in options["environment"].split(","):
            print(f"{name}={os.environ.get(name)}", flush=True)  # noqa: TID251 - what it was given is what it tells
    say(PhaseEvent(phase="loading", done_bytes=1, total_bytes=2))
    listener = _listen(spec.listen)
    host, port = listener.getsockname()[:2]
    say(ListeningEvent(endpoint=f"{host}:{port}"))
    say(ReadyEvent(endpoint=f"{host}:{port}", limit=4, memory_bytes=1000))
    say(LoadEvent(in_flight=1, memory_bytes=2000))
    for number in range(int(options.get("lines", "0"))):
        print("line", number, flush=True)
    if behave == "exit":
        print("good bye, cruel world", flush=True)
        raise SystemExit(7)
    while True:
        signal.pause()


def _listen(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    listener = socket.socket()
    listener.bind((host, int(port)))
    listener.listen()
    return listener


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(9)


if __name__ == "__main__":
    main()
