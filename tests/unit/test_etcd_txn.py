"""Compares and operations, and how they look on the wire."""

import pytest

from localmesh.etcd import codec
from localmesh.etcd import transactions as t
from localmesh.thirdparty import etcd_pb2 as pb


def test_every_operator_and_target_has_its_number_on_the_wire() -> None:
    conditions = [
        t.version("k") == 1,
        t.create("k") != 2,
        t.mod("k") < 3,
        t.value("k") > b"x",
        t.lease("k") == 5,
    ]
    request = codec.txn_request(conditions, [], [])
    C = pb.Compare  # noqa: N806 - a message type
    assert list(request.compare) == [
        C(key=b"k", target=C.VERSION, result=C.EQUAL, version=1),
        C(key=b"k", target=C.CREATE, result=C.NOT_EQUAL, create_revision=2),
        C(key=b"k", target=C.MOD, result=C.LESS, mod_revision=3),
        C(key=b"k", target=C.VALUE, result=C.GREATER, value=b"x"),
        C(key=b"k", target=C.LEASE, result=C.EQUAL, lease=5),
    ]


def test_a_compare_with_zero_still_names_its_target() -> None:
    """A oneof that is left unset compares with nothing that we meant."""
    (compare,) = codec.txn_request([t.create("k") == 0], [], []).compare
    assert compare.WhichOneof("target_union") == "create_revision"


def test_ranges_are_compared_by_prefix_or_end() -> None:
    assert (t.version("a/", prefix=True) == 0).range_end == b"a0"
    assert (t.version("a", range_end="c") == 0).range_end == b"c"
    assert (t.version("a") == 0).range_end == b""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: t.version("k") == "1", "version of a key is compared with int"),
        (lambda: t.version("k") == True, "version of a key is compared with int"),  # noqa: E712
        (lambda: t.value("k") == 1, "value of a key is compared with bytes"),
        (lambda: t.value("k") == None, "value of a key is compared with bytes"),  # noqa: E711
    ],
)
def test_an_operand_of_the_wrong_kind_is_an_error_here(make: object, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        make()  # type: ignore[operator]


def test_operations_keep_all_their_options_on_the_wire() -> None:
    request = codec.txn_request(
        [],
        [
            t.put("k", "v", 7, prev_kv=True),
            t.put("k2", "v", ignore_lease=True),
            t.put("k3", b"", ignore_value=True),
            t.get("a/", prefix=True, revision=3, limit=2, keys_only=True),
            t.delete("b", range_end="c", prev_kv=True),
        ],
        [t.txn([t.create("x") == 0], [t.get("x")], [t.delete("x")])],
    )
    put, keep_lease, keep_value, get, delete = request.success
    assert put.request_put == pb.PutRequest(key=b"k", value=b"v", lease=7, prev_kv=True)
    assert keep_lease.request_put == pb.PutRequest(key=b"k2", value=b"v", ignore_lease=True)
    assert keep_value.request_put == pb.PutRequest(key=b"k3", ignore_value=True)
    assert get.request_range == pb.RangeRequest(key=b"a/", range_end=b"a0", revision=3, limit=2, keys_only=True)
    assert delete.request_delete_range == pb.DeleteRangeRequest(key=b"b", range_end=b"c", prev_kv=True)
    nested = request.failure[0].request_txn
    assert (len(nested.compare), len(nested.success), len(nested.failure)) == (1, 1, 1)


def test_a_put_cannot_both_set_and_keep() -> None:
    with pytest.raises(ValueError, match="lease"):
        t.put("k", "v", 1, ignore_lease=True)
    with pytest.raises(ValueError, match="value"):
        t.put("k", "v", ignore_value=True)


def test_only_what_reads_at_every_depth_may_be_repeated() -> None:
    assert t.changes_nothing([])
    assert t.changes_nothing([t.get("k"), t.txn([], [t.get("k")], [t.get("j")])])
    assert not t.changes_nothing([t.get("k"), t.put("k", "v")])
    assert not t.changes_nothing([t.txn([], [t.get("k")], [t.delete("k")])])
    assert not t.changes_nothing([t.txn([], [t.txn([], [t.put("k", "v")])])])
