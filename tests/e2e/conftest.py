"""The command as people run it: in processes of its own, in a folder of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from localmesh.testing import MODELS_FOLDER

ROOT = Path(__file__).resolve().parents[2]
MINUTE = 60.0


class Sandbox:
    """A folder for state and temporary files, and commands that run in it.

    Whatever a command starts inherits TMPDIR, by which it is found again.
    """

    def __init__(self) -> None:
        # Short, because unix sockets lie below it.
        self.folder = Path(tempfile.mkdtemp(prefix="lm-e2e-"))
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        self.state = self.folder / "state"
        self.started: list[subprocess.Popen[str]] = []

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        own = dict(os.environ)  # noqa: TID251 - a test starts processes with its own environment
        kept = {k: v for k, v in own.items() if not k.startswith("LOCALMESH_") or k == "LOCALMESH_ETCD_BIN"}
        python_path = os.pathsep.join(filter(None, [str(ROOT), own.get("PYTHONPATH")]))
        mine = {"TMPDIR": str(self.temporary), "LOCALMESH_STATE_DIR": str(self.state), "PYTHONPATH": python_path}
        return kept | mine | dict(extra or {})

    def run(
        self, *words: str, env: Mapping[str, str] | None = None, text: str = "", timeout: float = MINUTE
    ) -> subprocess.CompletedProcess[str]:
        """Run `localmesh WORDS` to its end."""
        return subprocess.run(
            self.command(*words),
            env=self.environment(env),
            input=text,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=self.folder,
        )

    def json(self, *words: str) -> Any:
        """Run `localmesh WORDS -o json`, which must succeed, and return the document."""
        done = self.run(*words, "-o", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def start(self, *words: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start `localmesh WORDS`."""
        with (self.folder / f"out{len(self.started)}").open("w") as out:
            process = subprocess.Popen(
                self.command(*words),
                env=self.environment(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=self.folder,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def up(self, *words: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start `localmesh up` on free ports and wait until commands find it."""
        ports = ("--router-listen", "127.0.0.1:0", "--registry-listen", "127.0.0.1:0")
        models = ("--models-dir", str(MODELS_FOLDER))
        process = self.start("up", *ports, *models, "--drain-seconds", "5", *words, env=env)
        # A killed mesh leaves its note behind: wait for the one of this process.
        self.until(lambda: self.running().get("pid") == process.pid or process.poll() is not None)
        assert process.poll() is None, self.said(process)
        return process

    def said(self, process: subprocess.Popen[str]) -> str:
        """Return what a started command has printed."""
        return (self.folder / f"out{self.started.index(process)}").read_text()

    def running(self) -> dict[str, Any]:
        """Return what `up` wrote down for commands."""
        note = self.state / "up.json"
        found: dict[str, Any] = json.loads(note.read_text()) if note.exists() else {}
        return found

    @staticmethod
    def command(*words: str) -> list[str]:
        return [sys.executable, "-W", "error::ResourceWarning", "-m", "localmesh.cli", *words]

    @staticmethod
    def until(condition: Callable[[], object], seconds: float = MINUTE) -> None:
        deadline = time.monotonic() + seconds  # noqa: TID251 - a test's own deadline
        while not condition():
            assert time.monotonic() < deadline, "it did not come true in time"  # noqa: TID251 - as above
            time.sleep(0.05)

    def processes(self) -> dict[int, str]:
        """Return the command lines of all processes that were started from here, by pid."""
        marker = f"TMPDIR={self.temporary}".encode()
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    if marker in (folder / "environ").read_bytes().split(b"\0"):
                        found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue
        return {pid: line for pid, line in found.items() if line}

    def assert_nothing_left(self) -> None:
        """Check that no process and no temporary file is left."""
        self.until(lambda: not self.processes(), seconds=15)
        assert not list(self.temporary.iterdir())

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in self.started:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        left = self.processes()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not left, f"left behind: {left}"


@pytest.fixture(scope="session")
def make_sandbox() -> type[Sandbox]:
    """Return Sandbox, for fixtures that keep one for several tests. Whoever makes one closes it."""
    return Sandbox


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """Yield an empty sandbox."""
    box = Sandbox()
    yield box
    box.close()


@pytest.fixture(scope="session")
def mesh() -> Iterator[Sandbox]:
    """Yield a sandbox with a mesh of two nodes that runs for all tests: they must use models of their own names."""
    box = Sandbox()
    box.up("--workers", "2")
    yield box
    box.close()
