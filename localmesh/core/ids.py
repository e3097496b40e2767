"""Names of things, and which names are allowed."""

import re
from dataclasses import dataclass
from typing import NewType

ModelName = NewType("ModelName", str)
NodeName = NewType("NodeName", str)
DeviceId = NewType("DeviceId", str)
HolderId = NewType("HolderId", str)

CPU = DeviceId("cpu")

_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True, order=True)
class ReplicaId:
    """Names one replica: its model, its node, and its index among those of the model on that node."""

    model: ModelName
    node: NodeName
    index: int

    def __str__(self) -> str:
        """Return `model/node/index`, which is also the tail of its keys."""
        return f"{self.model}/{self.node}/{self.index}"

    @classmethod
    def parse(cls, text: str) -> "ReplicaId":
        """Read what `str()` wrote.

        Raises:
            ValueError: The text names no replica.
        """
        parts = text.split("/")
        if len(parts) != 3 or not parts[2].isascii() or not parts[2].isdigit():
            raise ValueError(f"not a replica: {text!r} (expected model/node/index)")
        return cls(model_name(parts[0]), node_name(parts[1]), int(parts[2]))


def model_name(text: str) -> ModelName:
    """Check and return the name of a model.

    Raises:
        ValueError: It is not 1 to 128 characters of [A-Za-z0-9._:-] that start with a letter or a digit.
    """
    if not _MODEL.fullmatch(text):
        raise ValueError(
            f"not a model name: {text!r} (1 to 128 of letters, digits, '.', '_', ':', '-', the first a letter or digit)"
        )
    return ModelName(text)


def node_name(text: str) -> NodeName:
    """Check and return the name of a node.

    Raises:
        ValueError: It is not 1 to 63 characters of [A-Za-z0-9._-] that start with a letter or a digit.
    """
    if not _NODE.fullmatch(text):
        raise ValueError(
            f"not a node name: {text!r} (1 to 63 of letters, digits, '.', '_', '-', the first a letter or digit)"
        )
    return NodeName(text)
