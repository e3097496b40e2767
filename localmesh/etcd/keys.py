"""Keys and ranges of keys."""

from __future__ import annotations

Key = bytes | str

# As range_end: every key from the start of the range on.
TO_THE_END = b"\0"


def as_bytes(key: Key) -> bytes:
    """Return the key as etcd stores it; text is UTF-8."""
    return key.encode() if isinstance(key, str) else key


def prefix_end(prefix: bytes) -> bytes:
    """Return the first key after all keys that start with `prefix`: the end of that range.

    Trailing 0xff bytes have no successor and are dropped; a prefix of nothing else, and the empty prefix,
    have no end but that of the keyspace.
    """
    trimmed = prefix.rstrip(b"\xff")
    if not trimmed:
        return TO_THE_END
    return trimmed[:-1] + bytes((trimmed[-1] + 1,))


def range_of(key: Key, *, prefix: bool = False, range_end: Key | None = None) -> tuple[bytes, bytes]:
    """Return (key, range_end) of the wire for one key, a prefix or an explicit range.

    The empty key is not a key to etcd: a prefix of "" starts at the byte 0.
    """
    start = as_bytes(key)
    if prefix:
        if range_end is not None:
            raise ValueError("a range is given by a prefix or by its end, not by both")
        return start or b"\0", prefix_end(start)
    if not start:
        raise ValueError("an etcd key is not empty")
    return start, as_bytes(range_end) if range_end is not None else b""
