"""Shows on stderr how a model loads: one line that changes on a terminal, a line for each change elsewhere."""

import sys
from typing import Self, TextIO

from localmesh.cli import tables
from localmesh.v1 import types_pb2 as pb


def describe(replica: pb.Replica) -> str:
    """Return one sentence on what a replica that is not ready yet does."""
    if not replica.ref.node:
        return "finding a node"
    state = pb.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_").lower()
    progress = replica.progress
    text = f"loading {replica.ref.model} on {replica.ref.node}: {progress.phase or state}"
    if progress.total_bytes:
        done = 100 * progress.done_bytes // progress.total_bytes
        text += f" {done} % of {tables.size(progress.total_bytes)}"
    left = progress.eta.ToMilliseconds() / 1000 if progress.HasField("eta") else 0.0
    return text + (f", about {tables.seconds(left)} left" if left else "")


class ProgressLine:
    """Writes progress. Use it as a context manager: it leaves a clean line behind."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._last = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live and self._last:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def show(self, text: str) -> None:
        """Show a new state."""
        if text == self._last:
            return
        self._last = text
        self._stream.write(f"\r\x1b[K{text}" if self._live else f"{text}\n")
        self._stream.flush()
