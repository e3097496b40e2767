"""How long a caller is held."""

from types import SimpleNamespace

import pytest

from localmesh.core.errors import ModelNotFound
from localmesh.core.ids import ModelName
from localmesh.core.records import ModelRecord, ModelSpec
from localmesh.core.snapshot import Snapshot
from localmesh.router.routing import Routing

M = ModelName("m")


class _Clock:
    def monotonic(self) -> float:
        return 100.0

    def time(self) -> float:
        return 0.0


def _routing() -> Routing:
    models = {M: ModelRecord(spec=ModelSpec(name=M, backend="llama", source="s"), revision="r")}
    mirror = SimpleNamespace(snapshot=Snapshot(revision=1, models=models))
    return Routing(mirror=mirror, holder=None, dispatcher=None, clock=_Clock(), hold_seconds=60.0)


@pytest.mark.parametrize(
    ("deadline", "until"),
    [(None, 160.0), (1000.0, 160.0), (110.0, 109.75), (101.0, 100.95), (99.0, 100.0)],
)
def test_a_caller_is_held_until_a_little_before_its_own_deadline(deadline: float | None, until: float) -> None:
    """F24."""
    assert _routing().session(M, deadline).patient_until == pytest.approx(until)


def test_a_model_that_is_not_declared_is_refused_before_anything_else() -> None:
    with pytest.raises(ModelNotFound):
        _routing().session(ModelName("other"), None)
