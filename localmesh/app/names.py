"""Names for nodes that nobody named."""

import re
from pathlib import Path

from localmesh.core.ids import NodeName, node_name

_LONGEST = 63


def node_name_of_host(host: str, suffix: str = "") -> NodeName:
    """Return the host's name as a node name: its first label, unfit characters replaced, cut to fit with the suffix."""
    label = re.sub(r"[^A-Za-z0-9._-]", "-", host.split(".")[0]).lstrip("-._") or "node"
    return node_name(label[: _LONGEST - len(suffix)] + suffix)


def worker_folder(state_dir: Path, name: str) -> Path:
    """Return where a worker keeps its key, conversions and replicas' files: several may share a state folder."""
    return state_dir / "workers" / name
