"""Commands on a terminal: a conversation, and Ctrl-C at any moment."""

import contextlib
import os
import pty
import signal
import subprocess
import time

import pytest

MODEL = """apiVersion: localmesh/v1
kind: Model
name: talker
engine: llama
source: tiny.gguf
parameters: {context_tokens: 512, slots: 1}
"""


class Terminal:
    """A command that believes to run on a terminal."""

    def __init__(self, box, *words: str) -> None:
        self._box = box
        self._main, side = pty.openpty()
        os.set_blocking(self._main, False)
        self.said = ""
        self.process = subprocess.Popen(
            box.command(*words),
            env=box.environment({"TERM": "dumb"}),
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
            cwd=box.folder,
        )
        os.close(side)

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def wait_for(self, text: str, after: int = 0) -> int:
        """Wait until a text is shown after a place in what was said; return the place behind it."""

        def shown() -> bool:
            with contextlib.suppress(BlockingIOError, OSError):
                self.said += os.read(self._main, 65536).decode(errors="replace")
            return text in self.said[after:]

        self._box.until(shown)
        return self.said.index(text, after) + len(text)

    def end(self) -> int:
        code = self.process.wait(timeout=30)
        os.close(self._main)
        return code


def test_a_conversation_goes_on_over_several_messages_and_ends_with_ctrl_d(mesh) -> None:
    assert mesh.run("apply", "-f", "-", text=MODEL).returncode == 0
    talk = Terminal(mesh, "chat", "talker", "-n", "12", "--temperature", "0")
    place = talk.wait_for("> ")
    for _ in range(2):
        talk.type("Hello\n")
        place = talk.wait_for("> ", place)
    answer = talk.said
    talk.type("\x04")
    assert talk.end() == 0
    assert "Type a message" in answer
    assert "Traceback" not in answer


def test_ctrl_c_at_the_prompt_of_a_conversation_ends_it_with_130(mesh) -> None:
    assert mesh.run("apply", "-f", "-", text=MODEL).returncode == 0
    talk = Terminal(mesh, "chat", "talker")
    talk.wait_for("> ")
    talk.process.send_signal(signal.SIGINT)
    assert talk.end() == 130
    assert "Traceback" not in talk.said


@pytest.mark.parametrize("seconds", [0.3, 0.7, 1.1, 1.5, 2.0])
def test_ctrl_c_while_it_starts_leaves_nothing(sandbox, seconds: float) -> None:
    up = sandbox.start("up", "--workers", "2", "--router-listen", "127.0.0.1:0", "--registry-listen", "127.0.0.1:0")
    time.sleep(seconds)  # the moment is the point: somewhere in the start
    up.send_signal(signal.SIGINT)
    assert up.wait(timeout=40) in (0, 130, -signal.SIGINT)
    assert "fault" not in sandbox.said(up)
    sandbox.assert_nothing_left()
