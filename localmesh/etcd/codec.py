"""Between etcd's messages and ours. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from localmesh.etcd import txn
from localmesh.etcd.messages import DeleteResult, Event, EventKind, KeyValue, PutResult, RangeResult, TxnResult
from localmesh.thirdparty import etcd_pb2 as pb

_OPERATORS = {
    "==": pb.Compare.EQUAL,
    "!=": pb.Compare.NOT_EQUAL,
    ">": pb.Compare.GREATER,
    "<": pb.Compare.LESS,
}
_TARGETS = {
    "version": (pb.Compare.VERSION, "version"),
    "create": (pb.Compare.CREATE, "create_revision"),
    "mod": (pb.Compare.MOD, "mod_revision"),
    "value": (pb.Compare.VALUE, "value"),
    "lease": (pb.Compare.LEASE, "lease"),
}


def key_value(kv: Any) -> KeyValue:
    """Decode one key."""
    return KeyValue(kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)


def range_result(response: Any) -> RangeResult:
    """Decode the answer to a Range."""
    return RangeResult(
        tuple([key_value(kv) for kv in response.kvs]), response.header.revision, response.more, response.count
    )


def put_result(response: Any) -> PutResult:
    """Decode the answer to a Put."""
    prev = key_value(response.prev_kv) if response.HasField("prev_kv") else None
    return PutResult(response.header.revision, prev)


def delete_result(response: Any) -> DeleteResult:
    """Decode the answer to a DeleteRange."""
    return DeleteResult(response.header.revision, response.deleted, tuple([key_value(kv) for kv in response.prev_kvs]))


def txn_result(response: Any) -> TxnResult:
    """Decode the answer to a Txn, nested ones included."""
    return TxnResult(
        response.succeeded,
        response.header.revision,
        tuple([_operation_result(operation) for operation in response.responses]),
    )


def _operation_result(operation: Any) -> RangeResult | PutResult | DeleteResult | TxnResult:
    match operation.WhichOneof("response"):
        case "response_range":
            return range_result(operation.response_range)
        case "response_put":
            return put_result(operation.response_put)
        case "response_delete_range":
            return delete_result(operation.response_delete_range)
        case "response_txn":
            return txn_result(operation.response_txn)
        case other:
            raise ValueError(f"etcd answered an operation with {other!r}, which this client does not know")


def event(message: Any) -> Event:
    """Decode one event of a watch."""
    kind = EventKind.DELETE if message.type == pb.Event.DELETE else EventKind.PUT
    prev = key_value(message.prev_kv) if message.HasField("prev_kv") else None
    return Event(kind, key_value(message.kv), prev)


def txn_request(compare: Iterable[txn.Compare], success: Sequence[txn.Op], failure: Sequence[txn.Op]) -> Any:
    """Encode a transaction."""
    return pb.TxnRequest(
        compare=[_compare(condition) for condition in compare],
        success=[_operation(op) for op in success],
        failure=[_operation(op) for op in failure],
    )


def _compare(condition: txn.Compare) -> Any:
    target, field = _TARGETS[condition.target]
    message = pb.Compare(
        key=condition.key, range_end=condition.range_end, target=target, result=_OPERATORS[condition.operator]
    )
    setattr(message, field, condition.operand)
    return message


def _operation(op: txn.Op) -> Any:
    match op:
        case txn.Put():
            return pb.RequestOp(request_put=put_request(op))
        case txn.Get():
            return pb.RequestOp(
                request_range=pb.RangeRequest(
                    key=op.key,
                    range_end=op.range_end,
                    revision=op.revision,
                    limit=op.limit,
                    keys_only=op.keys_only,
                    count_only=op.count_only,
                )
            )
        case txn.Delete():
            return pb.RequestOp(
                request_delete_range=pb.DeleteRangeRequest(key=op.key, range_end=op.range_end, prev_kv=op.prev_kv)
            )
        case txn.Txn():
            return pb.RequestOp(request_txn=txn_request(op.compare, op.success, op.failure))


def put_request(op: txn.Put) -> Any:
    """Encode a put."""
    return pb.PutRequest(
        key=op.key,
        value=op.value,
        lease=op.lease,
        prev_kv=op.prev_kv,
        ignore_value=op.ignore_value,
        ignore_lease=op.ignore_lease,
    )
