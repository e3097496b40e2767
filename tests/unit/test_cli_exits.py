"""Exit codes and hints."""

import pytest

from localmesh.app.exits import MEANING, Exit, exit_for
from localmesh.cli.hints import hint_for
from localmesh.core import errors as e
from localmesh.core.errors import MeshError
from localmesh.rpc.errors import WIRE


def test_every_exit_code_is_documented() -> None:
    assert set(MEANING) == set(Exit)


@pytest.mark.parametrize("kind", [k for k in WIRE if k not in (e.InternalError, e.EngineFailed)])
def test_every_failure_but_a_fault_has_an_exit_code_of_its_own_kind(kind: type[MeshError]) -> None:
    assert exit_for(kind("x")) is not Exit.FAILURE


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (e.ModelNotFound("x"), 4),
        (e.InvalidSpec("x"), 5),
        (e.ComponentUnreachable("x"), 3),
        (e.StoreUnavailable("x"), 3),
        (e.NoCapacity("x"), 6),
        (e.SourceMissing("x"), 7),
        (e.PermissionDenied("x"), 8),
        (e.EngineFailed("x"), 1),
    ],
)
def test_exit_codes_are_those_that_are_documented(error: MeshError, code: int) -> None:
    assert exit_for(error) == code


def test_a_derived_error_has_its_bases_hint() -> None:
    class Special(e.ModelNotFound):
        pass

    assert hint_for(Special("x")) == hint_for(e.ModelNotFound("x")) != ""
    assert hint_for(e.InternalError("x")) == ""
