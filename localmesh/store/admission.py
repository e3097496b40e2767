"""Who may register under a node's name, as a pure function of who asks and what was said of the name before.

A name belongs to a key from its approval on, and to the first key that asks while it is pending, so that an operator
approves what was looked at. Nothing that a worker says takes back anything that an operator said.
"""

from dataclasses import replace

from localmesh.core.errors import NodeNameTaken, NodePending
from localmesh.core.ids import NodeName
from localmesh.core.records import ApprovalRecord

_ASK_AGAIN_SECONDS = 1.0
_SHOWN_DIGITS = 16


def admit(
    node: NodeName, key_fingerprint: str, known: ApprovalRecord | None, *, auto_approve: bool, vouched: bool
) -> ApprovalRecord:
    """Return the approval under which a node registers; `known` itself where there is nothing to write.

    Args:
        node: Its name.
        key_fingerprint: Of the key that it has shown to hold.
        known: What is said of the name; None if nothing.
        auto_approve: Whether the mesh approves nodes of which nobody has said anything. One that waits goes on waiting:
            only an operator's word, or a token, ends that.
        vouched: Whether it has shown the mesh's join token.

    Raises:
        NodePending: Nobody has approved the node.
        NodeNameTaken: The name belongs to another key, or another one waits under it.
    """
    if known is not None and known.key_fingerprint not in ("", key_fingerprint):
        who = "belongs to another key" if known.approved else "was asked for with another key before"
        raise NodeNameTaken(
            f"The node name {node} {who}. Give this node another name, or remove the other one.", node=node
        )
    if known is not None and known.approved and known.key_fingerprint:
        return known
    unsaid = known is None or (known.approved and not known.key_fingerprint)
    if not vouched and not (auto_approve and unsaid):
        raise NodePending(
            f"The node {node} waits for approval by an operator: `localmesh node approve {node}`. Its key is"
            f" {key_fingerprint[:_SHOWN_DIGITS]}.",
            retry_after_seconds=_ASK_AGAIN_SECONDS,
            node=node,
        )
    if known is None:
        return ApprovalRecord(key_fingerprint=key_fingerprint)
    # What an operator has said of a node that was not approved yet, such as a cordon, stays.
    return replace(known, approved=True, key_fingerprint=key_fingerprint)


def waiting(key_fingerprint: str, known: ApprovalRecord | None) -> ApprovalRecord:
    """Return what to keep of a node that was found pending, for operators to see; `known` itself if that is it."""
    if known is None:
        return ApprovalRecord(key_fingerprint=key_fingerprint, approved=False)
    # An approval without a key is nobody's.
    return replace(known, key_fingerprint=key_fingerprint, approved=False)
