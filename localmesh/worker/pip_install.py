"""Backends made of Python packages: a virtual environment of their own, and a run.sh that starts what is in it."""

import asyncio
import hashlib
import json
import os
import re
import shlex
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from localmesh.core.errors import BackendInstallFailed, BackendInvalid

_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_SCRIPT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_LAST_LINES = 20
_LINE_BYTES = 64 << 10
_DIES_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Sets PR_SET_PDEATHSIG, which outlives the exec: a worker that is killed leaves no pip behind."""
_HAS_MODULE = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"


@dataclass(frozen=True, slots=True, kw_only=True)
class PipRequest:
    """Python packages, and what to run of them: a module or a console script."""

    requirements: tuple[str, ...]
    module: str = ""
    script: str = ""

    def check(self) -> None:
        """Check that it can be asked for.

        Raises:
            BackendInvalid: It cannot.
        """
        if not self.requirements:
            raise BackendInvalid("name at least one requirement, such as 'package==1.2'")
        for text in self.requirements:
            if not text.strip() or text.lstrip().startswith("-") or not text.isprintable() or len(text) > 1000:
                raise BackendInvalid(f"not a requirement: {text!r}")
        if bool(self.module) == bool(self.script):
            raise BackendInvalid("name either the module or the console script to run")
        if self.module and not _MODULE.fullmatch(self.module):
            raise BackendInvalid(f"not the name of a module: {self.module!r}")
        if self.script and not _SCRIPT.fullmatch(self.script):
            raise BackendInvalid(f"not the name of a console script: {self.script!r}")

    @property
    def sha256(self) -> str:
        """Of the words of the request."""
        words = json.dumps([*self.requirements, f"module:{self.module}", f"script:{self.script}"])
        return hashlib.sha256(words.encode()).hexdigest()

    def __str__(self) -> str:
        """Return it in words."""
        return f"pip {' '.join(self.requirements)} ({self.module or self.script})"


async def install(
    request: PipRequest,
    folder: Path,
    *,
    environment: Mapping[str, str],
    silence_seconds: float,
    told: Callable[[str], None],
) -> None:
    """Make a backend in an empty folder.

    Args:
        request: What to install.
        folder: Where. It may be moved afterwards.
        environment: Of pip.
        silence_seconds: How long pip may go without a word.
        told: Told what pip says.

    Raises:
        BackendInvalid: The packages do not have what is to be run.
        BackendInstallFailed: pip failed.
    """
    python = folder / "venv" / "bin" / "python"

    async def run(what: str, *words: str) -> None:
        told(what)
        code, last = await _run(words, environment=environment, silence_seconds=silence_seconds, told=told)
        if code:
            raise BackendInstallFailed(f"{what} failed (exit code {code}):\n{last}")

    await run("making a virtual environment", sys.executable, "-m", "venv", str(folder / "venv"))
    pip = (str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--progress-bar", "off")
    await run(f"installing {' '.join(request.requirements)}", *pip, "--", *request.requirements)
    if request.module:
        code, _ = await _run(
            (str(python), "-c", _HAS_MODULE, request.module),
            environment=environment,
            silence_seconds=silence_seconds,
            told=lambda _: None,
        )
        if code:
            raise BackendInvalid(f"the packages have no module {request.module!r}")
    elif not (python.parent / request.script).is_file():
        raise BackendInvalid(f"the packages have no console script {request.script!r}")
    script = folder / "run.sh"
    script.write_text(_run_script(request))
    script.chmod(0o755)


def _run_script(request: PipRequest) -> str:
    # a console script names its interpreter by the path where it was installed, which has changed since
    what = f"-m {shlex.quote(request.module)}" if request.module else f'"$here/venv/bin/{request.script}"'
    return f"""#!/bin/sh
# Made by localmesh.
here=$(dirname "$(readlink -f "$0")")
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
exec "$here/venv/bin/python" {what} "$@"
"""


async def _run(
    words: tuple[str, ...], *, environment: Mapping[str, str], silence_seconds: float, told: Callable[[str], None]
) -> tuple[int, str]:
    """Run a program to its end, and return its exit code and last lines. Cancelled, end it and all that it started."""
    kept = {k: v for k, v in environment.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _DIES_WITH_PARENT, str(os.getpid()), *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**kept, "PYTHONUNBUFFERED": "1"},
        process_group=0,
        limit=_LINE_BYTES,
    )
    last: deque[str] = deque(maxlen=_LAST_LINES)
    try:
        while line := await _line(process, silence_seconds):
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                last.append(text)
                told(text)
        async with asyncio.timeout(silence_seconds):
            code = await process.wait()
    except TimeoutError:
        raise BackendInstallFailed(
            f"{Path(words[0]).name} said nothing for {silence_seconds:.0f} s, and was stopped\n" + "\n".join(last)
        ) from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return code, "\n".join(last)


async def _line(process: asyncio.subprocess.Process, silence_seconds: float) -> bytes:
    assert process.stdout is not None  # noqa: S101 - asked for above
    async with asyncio.timeout(silence_seconds):
        try:
            return await process.stdout.readline()
        except ValueError:  # longer than the buffer, and dropped
            return b"...\n"
