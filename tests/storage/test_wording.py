"""Texts that others wrote, as they are kept and shown."""

import pytest

from storage.wording import on_one_line, reason_of, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain: Straße, 道", "plain: Straße, 道"),
        ("\x1b]0;owned\x07.mp4", "\\x1b]0;owned\\x07.mp4"),
        ("a\tb\r\nc\x9b2J\u202e", "a\\tb\\r\\nc\\x9b2J\\u202e"),
        ("\udcff.mp4", "\\udcff.mp4"),
        ("why? s3://bucket/a@b.mp4: gone", "why? s3://bucket/a@b.mp4: gone"),
        ("http://h/a.mp4?X-Amz-Signature=s: gone", "http://h/a.mp4?...: gone"),
        ("403, url='http://h/a?sig=it's&b=s'", "403, url='http://h/a?...'"),
        ("a=http://h/,b=http://u:p@ss@h/y?sig=1", "a=http://h/,b=http://h/y?..."),
        ("next?u=https://h/p?sig=s, kept", "next?..., kept"),
        ("(https://me:secret@h/a), s3://k:s@b", "(https://h/a), s3://b"),
    ],
)
def test_shown_text_has_no_secret_and_no_control_character(text, expected):
    assert shown(text) == expected


def test_reason_of_an_error_is_one_line():
    error = ValueError("two\n  lines of\x1b[2J http://h/a?token=s")
    assert reason_of(error) == "ValueError: two lines of\\x1b[2J http://h/a?..."
    assert on_one_line("two\n  lines") == "two lines"
