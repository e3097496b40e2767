"""Owners of tasks: nothing is left running, no cancellation is lost."""

import asyncio

import pytest

from localmesh.etcd.tasks import TaskOwner, until_one_ends


async def forever(ended: list[str], name: str) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        ended.append(name)


async def fail() -> None:
    raise ValueError("mine")


async def nothing() -> None:
    return


async def test_closing_an_owner_ends_all_its_tasks() -> None:
    owner, ended = TaskOwner(), []
    for name in ("a", "b"):
        owner.start(forever(ended, name), name)
    await asyncio.sleep(0)
    await owner.close()
    assert sorted(ended) == ["a", "b"]
    with pytest.raises(RuntimeError, match="after its owner was closed"):
        owner.start(nothing(), "late")


async def test_a_task_that_dies_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    owner = TaskOwner()
    await asyncio.wait([owner.start(fail(), "the one")])
    await asyncio.sleep(0)
    assert "task the one died" in caplog.text
    await owner.close()


async def test_the_first_that_ends_ends_the_others() -> None:
    ended: list[str] = []
    await until_one_ends(forever(ended, "other"), nothing())
    assert ended == ["other"]


async def test_the_first_error_is_raised_bare() -> None:
    ended: list[str] = []
    with pytest.raises(ValueError, match="mine"):
        await until_one_ends(forever(ended, "other"), fail())
    assert ended == ["other"]


async def test_a_cancellation_from_outside_ends_all_and_goes_on_outside() -> None:
    ended: list[str] = []
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await until_one_ends(forever(ended, "a"), forever(ended, "b"))
    assert sorted(ended) == ["a", "b"]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
