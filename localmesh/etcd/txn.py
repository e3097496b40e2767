"""Compares and operations of transactions, named as in etcd3.

    from localmesh.etcd import transactions as t
    await client.transaction([t.create("k") == 0], [t.put("k", b"v")], [t.get("k")])

A comparison with `==`, `!=`, `<` or `>` gives a Compare. Two facts of etcd to keep in mind: a compare of the
VALUE of a key that does not exist is false, whatever the operator (test absence with `create(key) == 0`); and
over an empty range every compare holds for `version == 0`, as it does for a single missing key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from localmesh.etcd.keys import Key, as_bytes, range_of

Operator = Literal["==", "!=", "<", ">"]
TargetName = Literal["version", "create", "mod", "value", "lease"]
OperandT = TypeVar("OperandT", int, bytes)


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition on one key, or on every key of a range."""

    target: TargetName
    operator: Operator
    key: bytes
    operand: int | bytes
    range_end: bytes = b""


class Comparable(Generic[OperandT]):
    """The left side of a condition."""

    __slots__ = ("_key", "_range_end", "_target")
    __hash__ = object.__hash__

    def __init__(self, target: TargetName, key: Key, prefix: bool, range_end: Key | None) -> None:
        self._target: TargetName = target
        self._key, self._range_end = range_of(key, prefix=prefix, range_end=range_end)

    def _compare(self, operator: Operator, operand: object) -> Compare:
        wanted = bytes if self._target == "value" else int
        if isinstance(operand, str) and wanted is bytes:
            operand = operand.encode()
        if not isinstance(operand, wanted) or isinstance(operand, bool):
            raise TypeError(f"{self._target} of a key is compared with {wanted.__name__}, not {operand!r}")
        return Compare(self._target, operator, self._key, operand, self._range_end)

    def __eq__(self, other: object) -> Compare:  # type: ignore[override]
        return self._compare("==", other)

    def __ne__(self, other: object) -> Compare:  # type: ignore[override]
        return self._compare("!=", other)

    def __lt__(self, other: OperandT) -> Compare:
        return self._compare("<", other)

    def __gt__(self, other: OperandT) -> Compare:
        return self._compare(">", other)


def value(key: Key, *, prefix: bool = False, range_end: Key | None = None) -> Comparable[bytes]:
    """Return the value of a key. Every compare with it is false where the key does not exist."""
    return Comparable("value", key, prefix, range_end)


def version(key: Key, *, prefix: bool = False, range_end: Key | None = None) -> Comparable[int]:
    """Return the number of puts since the key was created; 0 where it does not exist."""
    return Comparable("version", key, prefix, range_end)


def create(key: Key, *, prefix: bool = False, range_end: Key | None = None) -> Comparable[int]:
    """Return the revision that created the key; 0 where it does not exist."""
    return Comparable("create", key, prefix, range_end)


def mod(key: Key, *, prefix: bool = False, range_end: Key | None = None) -> Comparable[int]:
    """Return the revision of the last put; 0 where the key does not exist."""
    return Comparable("mod", key, prefix, range_end)


def lease(key: Key, *, prefix: bool = False, range_end: Key | None = None) -> Comparable[int]:
    """Return the id of the key's lease; 0 where it has none or does not exist."""
    return Comparable("lease", key, prefix, range_end)


@dataclass(frozen=True, slots=True)
class Put:
    """See put()."""

    key: bytes
    value: bytes
    lease: int = 0
    prev_kv: bool = False
    ignore_value: bool = False
    ignore_lease: bool = False


@dataclass(frozen=True, slots=True)
class Get:
    """See get()."""

    key: bytes
    range_end: bytes = b""
    revision: int = 0
    limit: int = 0
    keys_only: bool = False
    count_only: bool = False


@dataclass(frozen=True, slots=True)
class Delete:
    """See delete()."""

    key: bytes
    range_end: bytes = b""
    prev_kv: bool = False


@dataclass(frozen=True, slots=True)
class Txn:
    """See txn()."""

    compare: tuple[Compare, ...]
    success: tuple[Op, ...]
    failure: tuple[Op, ...]


Op = Put | Get | Delete | Txn


def put(
    key: Key,
    value: bytes | str,
    lease: int = 0,
    *,
    prev_kv: bool = False,
    ignore_value: bool = False,
    ignore_lease: bool = False,
) -> Put:
    """Put a key. Without `lease` a leased key loses its lease; `ignore_lease` keeps what it has.

    `ignore_value` and `ignore_lease` make etcd refuse the transaction where the key does not exist.
    """
    if ignore_lease and lease:
        raise ValueError("a put sets a lease or keeps the present one, not both")
    if ignore_value and value:
        raise ValueError("a put sets a value or keeps the present one, not both")
    return Put(as_bytes(key), as_bytes(value), lease, prev_kv, ignore_value, ignore_lease)


def get(
    key: Key,
    *,
    prefix: bool = False,
    range_end: Key | None = None,
    revision: int = 0,
    limit: int = 0,
    keys_only: bool = False,
    count_only: bool = False,
) -> Get:
    """Read a key or a range, as of the operations before it in the same transaction."""
    start, end = range_of(key, prefix=prefix, range_end=range_end)
    return Get(start, end, revision, limit, keys_only, count_only)


def delete(key: Key, *, prefix: bool = False, range_end: Key | None = None, prev_kv: bool = False) -> Delete:
    """Delete a key or a range."""
    start, end = range_of(key, prefix=prefix, range_end=range_end)
    return Delete(start, end, prev_kv)


def txn(compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()) -> Txn:
    """Nest a transaction: its operations run by its own compares, atomically with all the others."""
    return Txn(tuple(compare), tuple(success), tuple(failure))


def changes_nothing(operations: Sequence[Op]) -> bool:
    """Return whether all the operations only read, so that a transaction of them may be repeated."""
    return all(
        isinstance(op, Get) or (isinstance(op, Txn) and changes_nothing(op.success) and changes_nothing(op.failure))
        for op in operations
    )
