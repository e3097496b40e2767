"""When a crashed component is started again: a pure policy."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """Delays double from the first to the longest, and start anew after a run that lasted."""

    first_seconds: float = 0.2
    longest_seconds: float = 15.0
    lasted_seconds: float = 30.0
    """A run at least this long was a good one."""


@dataclass(frozen=True, slots=True)
class Crashes:
    """What the policy remembers of one component."""

    in_a_row: int = 0


def after_crash(policy: RestartPolicy, crashes: Crashes, *, ran_seconds: float) -> tuple[Crashes, float]:
    """Return the new memory and how many seconds to wait before the next start."""
    before = 0 if ran_seconds >= policy.lasted_seconds else crashes.in_a_row
    # The exponent is bounded, so that a component that crashes for weeks does not overflow a float.
    delay = min(policy.first_seconds * 2.0 ** min(before, 30), policy.longest_seconds)
    return replace(crashes, in_a_row=before + 1), delay
