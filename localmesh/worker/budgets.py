"""Memory budgets as people write them."""

import re

_UNITS = {
    "": 1, "B": 1,
    "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9, "T": 10**12, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*|%)")


def budget_bytes(text: str, *, total_bytes: int) -> int:
    """Return how many bytes of a device replicas may claim.

    Args:
        text: A part of the total ("80%"), or an amount ("12GiB", "500 MB", "1073741824").
        total_bytes: Memory of the device.

    Returns:
        At most `total_bytes`.

    Raises:
        ValueError: It is neither, or more than 100 %.
    """
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a memory budget: {text!r} (expected e.g. 80%, 12GiB or bytes)")
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
