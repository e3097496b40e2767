"""When a crashed component is started again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmesh.app.restart import Crashes, RestartPolicy, after_crash

POLICY = RestartPolicy(first_seconds=1.0, longest_seconds=8.0, lasted_seconds=30.0)


def test_delays_double_up_to_the_longest() -> None:
    crashes, delays = Crashes(), []
    for _ in range(6):
        crashes, delay = after_crash(POLICY, crashes, ran_seconds=0.1)
        delays.append(delay)
    assert delays == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_a_run_that_lasted_starts_the_delays_anew() -> None:
    crashes = Crashes(in_a_row=5)
    crashes, delay = after_crash(POLICY, crashes, ran_seconds=30.0)
    assert delay == pytest.approx(1.0)
    assert after_crash(POLICY, crashes, ran_seconds=1.0)[1] == pytest.approx(2.0)


@given(in_a_row=st.integers(0, 10**9), ran=st.floats(0, 10**9))
def test_a_delay_is_always_between_the_first_and_the_longest(in_a_row: int, ran: float) -> None:
    _, delay = after_crash(POLICY, Crashes(in_a_row=in_a_row), ran_seconds=ran)
    assert POLICY.first_seconds <= delay <= POLICY.longest_seconds
