"""Scorers of the placement: they order the nodes that passed all filters. The first that tells two nodes apart decides.

Each returns a number, and less is better. Where all of them are equal, a hash over model and node decides: always the
same for the same two, so that a plan can be made again, and another one for another model, so that many models that are
placed at the same time on equal nodes do not all go to the same one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from localmesh.core.ids import DeviceId, NodeName
from localmesh.scheduling.question import Question

_STEP_BYTES = 64 << 20
"""Differences of free memory below this are noise of the measurement, and are no reason for a choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A feasible node, and what the replica would take there."""

    node: NodeName
    devices: Mapping[DeviceId, int]
    """Bytes on each device."""
    room_bytes: int
    """What can be claimed on the fullest of the devices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """One way to prefer a node."""

    name: str
    score: Callable[[Question, Option], int]


def _better_device(question: Question, option: Option) -> int:
    devices = question.all_devices(option.node)
    return 0 if all(devices[device].kind == "gpu" for device in option.devices) else 1


def _fewest_of_model(question: Question, option: Option) -> int:
    return len(question.indices(option.node))


def _idle(question: Question, option: Option) -> int:
    return 1 if question.residents(option.node) else 0


def _most_free_memory(question: Question, option: Option) -> int:  # noqa: ARG001 - all scorers are called alike
    return -(option.room_bytes // _STEP_BYTES)


def _fewest_in_flight(question: Question, option: Option) -> int:
    return sum(question.snapshot.in_flight(replica) for replica in question.residents(option.node))


def _files_there(question: Question, option: Option) -> int:
    source = question.source(option.node)
    return 0 if source is not None and source.present else 1


SCORERS: tuple[Scorer, ...] = (
    Scorer(name="better-device", score=_better_device),
    Scorer(name="fewest-of-model", score=_fewest_of_model),
    Scorer(name="idle", score=_idle),
    Scorer(name="most-free-memory", score=_most_free_memory),
    Scorer(name="fewest-in-flight", score=_fewest_in_flight),
    Scorer(name="files-there", score=_files_there),
)


def scores(question: Question, option: Option) -> tuple[int, ...]:
    """Return the option's score by each scorer."""
    return tuple(scorer.score(question, option) for scorer in SCORERS)


def rank(question: Question, options: list[Option]) -> list[Option]:
    """Return the options, the best first."""
    return sorted(options, key=lambda o: (*scores(question, o), _spread_by_model(question, o.node), o.node))


def _spread_by_model(question: Question, node: NodeName) -> bytes:
    return blake2b(f"{node} {question.model.spec.name}".encode(), digest_size=8).digest()
