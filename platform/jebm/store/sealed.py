"""JSON that carries a hash of itself, so that one flipped bit anywhere in it is noticed."""

import hashlib

from jebm.untrusted import JsonObject, encoded_json, parsed_object

__all__ = ["READS", "sealed", "unsealed"]

READS = 3
"""How often a small object is read before it is considered damaged: the next answer may be whole."""

_FIELD = "sha256"


def sealed(content: JsonObject) -> bytes:
    """Return the one text of a JSON object, with the SHA-256 of the text without it as its field sha256."""
    return encoded_json({**content, _FIELD: hashlib.sha256(encoded_json(content)).hexdigest()})


def unsealed(encoded: bytes, most_bytes: int) -> JsonObject:
    """Return what was sealed, without the hash.

    Raises ValueError for anything but what `sealed` returns, to the byte.
    """
    content = parsed_object(encoded, most_bytes)
    content.pop(_FIELD, None)
    if sealed(content) != encoded:
        raise ValueError("it does not match the hash that it carries")
    return content
