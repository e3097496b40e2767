"""Scorers of the placement: they order the nodes that passed all filters. The first that tells two nodes apart decides.

Each returns a number, and less is better.
"""

from collections.abc import Callable
from dataclasses import dataclass

from localmesh.core.ids import NodeName
from localmesh.core.records import DeviceRecord
from localmesh.scheduling.filters import Question


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A feasible node, and the device that the replica would take there."""

    node: NodeName
    device: DeviceRecord
    free_bytes: int
    """What can be claimed on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """One way to prefer a node."""

    name: str
    score: Callable[[Question, Option], int]


def _better_device(question: Question, option: Option) -> int:  # noqa: ARG001 - all scorers are called alike
    return 0 if option.device.kind == "gpu" else 1


def _fewest_of_model(question: Question, option: Option) -> int:
    return len(question.indices(option.node))


def _most_free_memory(question: Question, option: Option) -> int:  # noqa: ARG001 - all scorers are called alike
    return -option.free_bytes


SCORERS: tuple[Scorer, ...] = (
    Scorer(name="better-device", score=_better_device),
    Scorer(name="fewest-of-model", score=_fewest_of_model),
    Scorer(name="most-free-memory", score=_most_free_memory),
)


def rank(question: Question, options: list[Option]) -> list[Option]:
    """Return the options, the best first. Equal ones stand by name, so that the same state gives the same order."""
    return sorted(options, key=lambda o: (*(s.score(question, o) for s in SCORERS), o.node, o.device.id))
