"""Memory budgets: how people write them, and what of a device may be claimed. The only place that works them out.

A part is always one of the device's whole memory, never of another budget: however often a budget is resolved, and
whoever does it, 80 % stays 80 %.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from localmesh.core.records import DeviceRecord

EVERY_DEVICE: Final = "*"
"""In an operator's budgets: every device that is not named."""

_UNITS = {
    "": 1, "B": 1,
    "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9, "T": 10**12, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
_AMOUNT = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]{0,3}|%)")


def budget_bytes(text: str, *, total_bytes: int) -> int:
    """Return how many bytes of a device replicas may claim.

    Args:
        text: A part of the total ("80%"), or an amount ("12GiB", "500 MB", "1073741824").
        total_bytes: Memory of the device, all of it.

    Returns:
        At most `total_bytes`.

    Raises:
        ValueError: It is neither, or more than 100 %.
    """
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a memory budget: {text[:100]!r} (expected e.g. 80%, 12GiB or bytes)")
    amount, unit = match.groups()
    if unit == "%":
        percent = float(amount)
        if percent > 100:
            raise ValueError(f"not a memory budget: {text!r} is more than all of it")
        return int(total_bytes * percent / 100)
    factor = _UNITS.get(unit.upper())
    if factor is None:
        raise ValueError(f"not a memory budget: {text!r} has the unknown unit {unit!r} (expected %, MiB, GiB, MB, GB)")
    # whole numbers stay exact
    wanted = int(amount) * factor if amount.isdigit() else int(float(amount) * factor)
    return min(wanted, total_bytes)


def with_budget(device: DeviceRecord, overrides: Mapping[str, str]) -> DeviceRecord:
    """Return a device with the budget that holds: the operator's for it, or for every device, else the worker's.

    Args:
        device: Its `worker_budget_bytes` is what the worker says; where that is not known, the present budget is.
        overrides: The operator's budgets, as in an ApprovalRecord. One that cannot be read counts as none.
    """
    own = device.worker_budget_bytes or device.budget_bytes
    text = overrides.get(device.id, overrides.get(EVERY_DEVICE))
    try:
        budget = own if text is None else budget_bytes(text, total_bytes=device.total_bytes)
    except ValueError:
        budget = own  # checked when it was set: written by another version, or by hand
    return replace(device, budget_bytes=budget, worker_budget_bytes=own)
