"""A clock that stands still until it is told to go on."""


class ManualClock:
    """A localmesh.core.clock.Clock under the test's control."""

    def __init__(self, monotonic: float = 1000.0, time: float = 1_700_000_000.0) -> None:
        self._monotonic = monotonic
        self._time = time

    def monotonic(self) -> float:
        """See Clock."""
        return self._monotonic

    def time(self) -> float:
        """See Clock."""
        return self._time

    def advance(self, seconds: float) -> None:
        """Let time pass.

        Raises:
            ValueError: The time would go back; use `set_time` for a wall clock that is set.
        """
        if seconds < 0:
            raise ValueError(f"a clock does not go back: {seconds}")
        self._monotonic += seconds
        self._time += seconds

    def set_time(self, time: float) -> None:
        """Set the wall clock, as an operator may at any moment, without time passing."""
        self._time = time
