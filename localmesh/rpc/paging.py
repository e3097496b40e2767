"""Pages of sorted lists. A page token says after which key the next page begins, so pages do not shift."""

import base64
import binascii
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from localmesh.core.errors import InvalidRequest

DEFAULT_PAGE_SIZE: Final = 100
MAX_PAGE_SIZE: Final = 1000

T = TypeVar("T")


def page(items: Iterable[T], *, key: Callable[[T], str], page_size: int, page_token: str) -> tuple[list[T], str]:
    """Return one page of items, sorted by key, and the token of the next page (empty on the last).

    Args:
        items: All items, in any order.
        key: Unique name of an item.
        page_size: As asked for: 0 means 100; above 1000 is read as 1000.
        page_token: Token of this page, empty for the first.

    Raises:
        InvalidRequest: A negative size, or a token that no earlier page gave.
    """
    if page_size < 0:
        raise InvalidRequest("page_size must not be negative", field="page_size")
    size = min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    ordered = sorted(items, key=key)
    start = bisect_right(ordered, _decode(page_token), key=key) if page_token else 0
    found = ordered[start : start + size]
    more = start + size < len(ordered)
    return found, _encode(key(found[-1])) if more else ""


def _encode(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode()).decode()


def _decode(token: str) -> str:
    try:
        return base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError) as error:
        raise InvalidRequest("page_token is not one that a page before gave", field="page_token") from error
