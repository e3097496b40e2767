"""Writes what commands found: tables, or JSON as protobuf defines it.

With `-o json` a command prints one JSON document: the response message of the RPC behind it in protobuf's JSON form
(lowerCamelCase keys, 64-bit numbers as strings, enums by name, fields without a value included), with all pages of a
list joined. Streams (`logs`) print one document a line. Keys are only ever added.
"""

import json
import sys
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from localmesh.core.errors import MeshError


def as_dict(message: Message) -> dict[str, Any]:
    """Return a message as its JSON document."""
    document: dict[str, Any] = MessageToDict(message, always_print_fields_with_no_presence=True)
    return document


def print_message(message: Message) -> None:
    """Print a message as a JSON document for people and programs alike."""
    print_document(as_dict(message))


def print_document(document: object, *, one_line: bool = False) -> None:
    """Print a JSON document."""
    text = json.dumps(document, ensure_ascii=False, indent=None if one_line else 2)
    write_line(text, flush=one_line)


def write_text(text: str) -> None:
    """Print text that a model or an engine made, at once. On a terminal what is not printable is left out: it could
    move the cursor, or worse."""
    if sys.stdout.isatty():
        text = "".join(char for char in text if char.isprintable() or char in "\n\t")
    sys.stdout.write(text)
    sys.stdout.flush()


def write_line(text: str, *, flush: bool = False) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")
    if flush:
        sys.stdout.flush()


def say(text: str) -> None:
    """Print a line at once: for commands that go on running."""
    write_line(text, flush=True)


def write_error(message: str, hint: str = "") -> None:
    """Tell a person what went wrong and what to do next, where the message itself does not name a command."""
    hint = "" if "`localmesh " in message else hint
    sys.stderr.write(f"localmesh: {message}\n" + (f"{hint}\n" if hint else ""))


def write_error_document(error: MeshError, exit_code: int) -> None:
    """Tell a program what went wrong: one JSON document on stderr."""
    body = {
        "reason": error.reason,
        "message": error.message,
        "metadata": dict(error.metadata),
        "retryAfterSeconds": error.retry_after_seconds,
        "exitCode": exit_code,
    }
    sys.stderr.write(json.dumps({"error": body}, ensure_ascii=False) + "\n")
