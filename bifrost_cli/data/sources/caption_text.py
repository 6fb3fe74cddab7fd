"""Caption text from untrusted bytes.

In: bytes of a caption file, or a string out of JSON. Out: the text, otherwise unchanged: byte order mark and
surrounding space gone, line ends as \\n. Unicode is not normalised. Does not know where captions come from.
"""

from __future__ import annotations

import codecs

MAX_BYTES = 64 * 1024


def decode_caption(data: bytes) -> str:
    """UTF-8, or UTF-16 with a byte order mark. ValueError says what is wrong, and at which byte."""
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name = "UTF-16" if encoding == "utf-16" else "UTF-8"
        raise ValueError(f"not {name} at byte {error.start}") from None
    return clean_text(text)


def clean_text(text: str) -> str:
    """Line ends and surrounding space put right. ValueError: NUL, half a surrogate pair, more than 64 KB."""
    if "\0" in text:
        raise ValueError(f"a NUL character at {text.index(chr(0))}")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at character {error.start}") from None
    if size > MAX_BYTES:
        raise ValueError(f"{size} bytes, more than {MAX_BYTES}")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").strip()
