"""Reading one field of a message without decoding the message."""

_VARINT, _FIXED64, _BYTES, _GROUP, _GROUP_END, _FIXED32 = range(6)
_MODEL_FIELD = 1
_MOST_FIELDS = 10_000


def model_field(message: bytes) -> str:
    """Return the first value of field 1, "model", of a request of localmesh.v1.InferenceService.

    Serializers write fields in the order of their numbers, so this reads a few bytes of a message of any size; it copes
    with any order. A message that does not have the field, or that is no message at all, has an empty model: what is
    wrong with it is for the replica to say.
    """
    at = 0
    try:
        for _ in range(_MOST_FIELDS):
            if at >= len(message):
                return ""
            tag, at = _varint(message, at)
            field, wire = tag >> 3, tag & 7
            if wire == _BYTES:
                size, at = _varint(message, at)
                if field == _MODEL_FIELD and at + size <= len(message):
                    return message[at : at + size].decode()
                at += size
            elif wire == _VARINT:
                _, at = _varint(message, at)
            elif wire in (_FIXED64, _FIXED32):
                at += 8 if wire == _FIXED64 else 4
            else:
                return ""  # groups are not used in our messages
    except (IndexError, UnicodeDecodeError):
        return ""
    return ""


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError("a varint that does not end")
