"""JSON that carries its own hash, so that any flipped bit is noticed."""

import hashlib

from jebm.untrusted import JsonObject, encoded_json, parsed_object

__all__ = ["READS", "sealed", "unsealed"]

READS = 3
"""How often a small object is read before it counts as damaged: the next response may be intact."""

_FIELD = "sha256"


def sealed(content: JsonObject) -> bytes:
    """Return a JSON object as canonical text; its field sha256 hashes the text without that field."""
    return encoded_json({**content, _FIELD: hashlib.sha256(encoded_json(content)).hexdigest()})


def unsealed(encoded: bytes, most_bytes: int) -> JsonObject:
    """Return the sealed object, without the hash.

    Raises ValueError for anything but the exact bytes that `sealed` returns.
    """
    content = parsed_object(encoded, most_bytes)
    content.pop(_FIELD, None)
    if sealed(content) != encoded:
        raise ValueError("it does not match the hash that it carries")
    return content
