"""How much memory a process and its children really take."""

import os
from pathlib import Path

_PROC = Path("/proc")


def group_memory_bytes(pid: int) -> int:
    """Return the proportional memory of a process and all its descendants, in bytes; 0 where it cannot be read.

    Pages that several processes map (the weights of replicas of one model) are divided among them (PSS), so the sum
    over all replicas of a node is what they take together.
    """
    return sum(_pss_bytes(p) for p in descendants(pid))


def own_memory_bytes() -> int:
    """Return the memory of this process and its children."""
    return group_memory_bytes(os.getpid())


def descendants(pid: int) -> list[int]:
    """Return a process and all that descend from it, as they are now."""
    found = [pid]
    for parent in found:  # grows while it is walked
        for thread in _names(_PROC / str(parent) / "task"):
            try:
                children = (_PROC / str(parent) / "task" / thread / "children").read_text().split()
            except OSError:
                continue
            found += [int(child) for child in children]
    return found


def _pss_bytes(pid: int) -> int:
    try:
        text = (_PROC / str(pid) / "smaps_rollup").read_text()
    except OSError:  # gone, or another user's
        return 0
    line = next((line for line in text.splitlines() if line.startswith("Pss:")), "Pss: 0 kB")
    return int(line.split()[1]) * 1024


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []
