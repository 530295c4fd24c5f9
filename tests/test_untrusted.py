"""A stranger's text: read strictly, or refused with a ValueError; printed so that it moves no cursor."""

import pytest

from jebm.untrusted import DEEPEST_JSON, escaped, parsed_json, parsed_object, whole_number


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"a": 1} x',
        b"\xff\xfe",
        b"NaN",
        b"[1e999]",
        b"-Infinity",
        b"1" * 5000,
        b'{"a": 1, "a": 2}',
        b'"\\ud800"',
        b"[" * 100_000,
        b"[" * (DEEPEST_JSON + 1) + b"]" * (DEEPEST_JSON + 1),
        b'{"a":' * 900 + b"1" + b"}" * 900,
        b'"' + b"x" * 1_000_000 + b'"',
    ],
)
def test_odd_json_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parsed_json(text, 1_000_000)


def test_plain_json_is_read() -> None:
    assert parsed_json(b'{"a": [1, 2.5, null, "\xc3\xa9"]}', 100) == {"a": [1, 2.5, None, "é"]}
    deep = b"[" * DEEPEST_JSON + b"]" * DEEPEST_JSON
    assert parsed_json(deep, 1000) is not None
    with pytest.raises(ValueError, match="no JSON object"):
        parsed_object(b"[]", 100)


def test_truth_is_no_number() -> None:
    with pytest.raises(ValueError, match="steps"):
        whole_number({"steps": True}, "steps", 0, 10)


def test_what_is_not_printable_is_escaped() -> None:
    assert escaped("naïve σ² 日本 a b") == "naïve σ² 日本 a b"
    assert escaped("\x1b[2J\r\n\x7f\x9b\u202e\udcff\u2028") == r"\x1b[2J\r\n\x7f\x9b\u202e\udcff\u2028"
