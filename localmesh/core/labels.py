"""Labels of nodes: those that every node has by itself, and the terms by which a policy selects nodes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, unique

from localmesh.core.ids import NodeName

NODE_NAME = "node.name"
REPLICA_SLOTS = "node.replica-slots"
CPU_ARCH = "cpu.arch"
GPU_VENDOR = "gpu.vendor"
GPU_COUNT = "gpu.count"
GPU_MEMORY = "gpu.memory"

_GIB = 1 << 30
_BUCKETS_GIB = (1, 2, 4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 141, 192, 256, 288, 384, 512)
_SHORT_OF_BUCKET = 0.93
"""What a GPU reports is up to this part of what its maker sells it as: 22.5 GiB of 24 with error correction on."""


@unique
class Operator(Enum):
    """How a term looks at a label."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"

    @property
    def takes_values(self) -> bool:
        """Whether a term with it names values: at least one, or none at all."""
        return self in (Operator.IN, Operator.NOT_IN)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectorTerm:
    """One condition on a node's labels. As in Kubernetes, NotIn also holds where the label is missing."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def mismatch(self, labels: Mapping[str, str]) -> str | None:
        """Return why labels do not fulfil it, as the rest of a sentence that begins with a node's name, or None."""
        value = labels.get(self.key)
        match self.operator:
            case Operator.IN if value is None:
                return f"has no label {self.key!r} ({self})"
            case Operator.IN if value not in self.values:
                return f"has the label {self.key}={value!r} ({self})"
            case Operator.NOT_IN if value in self.values:
                return f"has the label {self.key}={value!r} ({self})"
            case Operator.EXISTS if value is None:
                return f"has no label {self.key!r} ({self})"
            case Operator.DOES_NOT_EXIST if value is not None:
                return f"has the label {self.key}={value!r} ({self})"
        return None

    def __str__(self) -> str:
        """Return it as the end of a sentence: what the selector wants."""
        wanted = ", ".join(map(repr, self.values))
        match self.operator:
            case Operator.IN:
                return (
                    f"the selector wants {wanted}" if len(self.values) == 1 else f"the selector wants one of {wanted}"
                )
            case Operator.NOT_IN:
                return f"the selector wants none of {wanted}"
            case Operator.EXISTS:
                return "the selector wants it"
        return "the selector wants nodes without it"


def selector_mismatch(equal: Mapping[str, str], terms: Iterable[SelectorTerm], labels: Mapping[str, str]) -> str | None:
    """Return why labels do not fulfil a selector: `equal` names exact values, `terms` the rest; None if they do."""
    exact = (SelectorTerm(key=key, operator=Operator.IN, values=(value,)) for key, value in sorted(equal.items()))
    return next((why for term in (*exact, *terms) if (why := term.mismatch(labels)) is not None), None)


def automatic_labels(node: NodeName, *, gpu_bytes: Iterable[int], replica_slots: int) -> dict[str, str]:
    """Return the labels that follow from what the mesh knows of a node.

    Args:
        node: Its name.
        gpu_bytes: Memory of each of its GPUs.
        replica_slots: Replicas of one model that it may hold.
    """
    gpus = list(gpu_bytes)
    labels = {NODE_NAME: str(node), REPLICA_SLOTS: str(replica_slots), GPU_COUNT: str(len(gpus))}
    if gpus:
        labels[GPU_MEMORY] = gpu_memory_label(max(gpus))
    return labels


def gpu_memory_label(total_bytes: int) -> str:
    """Return the size that a GPU is sold as, by the memory that it reports: "24GiB" for 22.5 GiB."""
    fitting = [size for size in _BUCKETS_GIB if total_bytes >= _SHORT_OF_BUCKET * size * _GIB]
    return f"{max(fitting, default=0)}GiB"
