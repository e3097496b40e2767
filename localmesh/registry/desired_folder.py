"""A folder of YAML files with all desired state, for a store that does not survive a restart.

    models/<model>.yaml      as `localmesh apply` takes it
    nodes/<node>.yaml        what the operator, or auto-approval, said of a node

Each accepted change is in the folder, on the disk, before it is answered; at the start an empty store is filled from
it. A file is replaced whole (written beside, synced, renamed, folder synced), so that one is never half of two states.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml

from localmesh.core.budgets import budget_bytes
from localmesh.core.errors import InternalError, InvalidSpec
from localmesh.core.ids import ModelName, NodeName, node_name
from localmesh.core.records import ApprovalRecord, ModelSpec, Policy
from localmesh.rpc.convert import policy_from_proto, policy_to_proto, spec_from_proto, spec_to_proto
from localmesh.rpc.manifest import API_VERSION, parse_models, to_yaml

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SUFFIX: Final = ".yaml"
_UNFINISHED: Final = ".writing"
_MAX_BYTES: Final = 1 << 20


class DesiredFolder:
    """Reads and writes the folder. Its methods block: await them through `in_order`. One process may use a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._models = path / "models"
        self._nodes = path / "nodes"
        # One thread: writes reach the disk in the order they were asked for, also when who asked was cancelled.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="desired-folder")

    async def in_order(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run one of the folder's methods, after those that were asked for before."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def close(self) -> None:
        """Wait for what is being written, and take nothing more."""
        self._thread.shutdown()

    def open(self) -> None:
        """Make the folder, and remove what a crash left half-written.

        Raises:
            InternalError: It cannot be used.
        """
        with self._explained("use"):
            for folder in (self._models, self._nodes):
                folder.mkdir(parents=True, exist_ok=True)
                for leftover in folder.glob(f".*{_UNFINISHED}"):
                    leftover.unlink()

    def save_model(self, spec: ModelSpec, policy: Policy) -> None:
        """Keep a model.

        Raises:
            InternalError: It could not be written.
        """
        self._write(self._models / f"{spec.name}{_SUFFIX}", to_yaml(spec_to_proto(spec), policy_to_proto(policy)))

    def remove_model(self, model: ModelName) -> None:
        """Forget a model; one that is not there is fine.

        Raises:
            InternalError: It could not be removed.
        """
        self._remove(self._models / f"{model}{_SUFFIX}")

    def save_approval(self, node: NodeName, approval: ApprovalRecord) -> None:
        """Keep what was said of a node.

        Raises:
            InternalError: It could not be written.
        """
        text = yaml.safe_dump(
            {
                "apiVersion": API_VERSION,
                "kind": "Approval",
                "node": str(node),
                "key_fingerprint": approval.key_fingerprint,
                "approved": approval.approved,
                "cordoned": approval.cordoned,
                "draining": approval.draining,
                "labels": dict(sorted(approval.labels.items())),
                "max_replicas_per_model": approval.max_replicas_per_model,
                "memory_budgets": dict(sorted(approval.memory_budgets.items())),
            },
            sort_keys=False,
        )
        self._write(self._nodes / f"{node}{_SUFFIX}", text)

    def remove_approval(self, node: NodeName) -> None:
        """Forget what was said of a node; nothing said is fine.

        Raises:
            InternalError: It could not be removed.
        """
        self._remove(self._nodes / f"{node}{_SUFFIX}")

    def models(self) -> list[tuple[ModelSpec, Policy]]:
        """Return the models by name.

        Raises:
            InvalidSpec: A file is not acceptable; file, line and field are named.
            InternalError: The folder cannot be read.
        """
        return list(self._each(self._models, _read_model))

    def approvals(self) -> list[tuple[NodeName, ApprovalRecord]]:
        """Return what was said of nodes, by name. As models()."""
        return list(self._each(self._nodes, _read_approval))

    def _each(self, folder: Path, read: Callable[[Path, bytes], T]) -> Iterator[T]:
        with self._explained("read"):
            files = sorted(path for path in folder.glob(f"*{_SUFFIX}") if not path.name.startswith("."))
            texts = [(path, path.read_bytes()[: _MAX_BYTES + 1]) for path in files]
        for path, text in texts:
            yield read(path, text)

    def _remove(self, path: Path) -> None:
        with self._explained("write to"):
            path.unlink(missing_ok=True)
            _sync_folder(path.parent)

    def _write(self, path: Path, text: str) -> None:
        unfinished = path.with_name(f".{path.name}{_UNFINISHED}")
        with self._explained("write to"):
            if path.exists() and path.read_text(encoding="utf-8", errors="replace") == text:
                return
            with unfinished.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
            _sync_folder(path.parent)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InternalError(
                f"cannot {what} the folder of desired state {self._path}: {error.strerror or error}. Nothing is"
                " accepted that could not be kept; make room, or fix its permissions."
            ) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename or a removal in the folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_model(path: Path, text: bytes) -> tuple[ModelSpec, Policy]:
    declared = parse_models(text, origin=str(path))
    spec, policy = declared[0]
    if len(declared) != 1 or path.name != f"{spec.name}{_SUFFIX}":
        raise _refused(
            path, f"a file of this folder holds one model and is called after it; this one has {spec.name!r}"
        )
    return spec_from_proto(spec), policy_from_proto(policy, model=spec.name) if policy is not None else Policy()


def _read_approval(path: Path, text: bytes) -> tuple[NodeName, ApprovalRecord]:
    try:
        found: Any = yaml.safe_load(text.decode("utf-8"))
    except (yaml.YAMLError, UnicodeError) as error:
        raise _refused(path, f"not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or found.get("kind") != "Approval" or found.get("apiVersion") != API_VERSION:
        raise _refused(path, f"expected apiVersion: {API_VERSION} and kind: Approval")
    flags = {name: found.get(name, False) for name in ("approved", "cordoned", "draining")}
    labels, key, node = _texts(path, found, "labels"), found.get("key_fingerprint"), str(found.get("node"))
    budgets, slots = _texts(path, found, "memory_budgets"), found.get("max_replicas_per_model", 0)
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise _refused(path, "approved, cordoned and draining are true or false")
    if type(slots) is not int or not 0 <= slots < 1 << 31:
        raise _refused(path, "max_replicas_per_model is a number, 0 where the worker's word holds")
    if not isinstance(key, str) or f"{node}{_SUFFIX}" != path.name:
        raise _refused(path, "key_fingerprint is text, and node is what the file is called after")
    try:
        for budget in budgets.values():
            budget_bytes(budget, total_bytes=0)
        approval = ApprovalRecord(
            key_fingerprint=key, labels=labels, max_replicas_per_model=slots, memory_budgets=budgets, **flags
        )
        return node_name(node), approval
    except ValueError as error:
        raise _refused(path, str(error)) from None


def _texts(path: Path, found: dict[str, Any], field: str) -> dict[str, str]:
    texts = found.get(field) or {}
    if not isinstance(texts, dict) or not all(isinstance(x, str) for pair in texts.items() for x in pair):
        raise _refused(path, f"{field} are names with values, as text")
    return texts


def _refused(path: Path, problem: str) -> InvalidSpec:
    return InvalidSpec(f"{path}: {problem}. Fix the file or remove it.", file=path)
