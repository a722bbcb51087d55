"""The packed form of a script: a short Python file that carries the script's text, compressed.

It needs the standard library alone, and runs as the text would: the same module, the same
`__file__`, the text's lines in tracebacks and for `inspect`. What it carries can be read without
running it: everything around the compressed text is the same in every packed file.
"""

from __future__ import annotations

import base64
import bz2
import re
from pathlib import Path

READABLE = "train_gpt_readable.py"  # what a packed file carries, as text beside it
# bzip2 makes 51,442 bytes of train_gpt.py's 196,811, raw LZMA2 at its best 54,135, and bzip2's
# releases give the same bytes.
HEAD = b'''"""train_gpt_readable.py, packed by records/tools/submit.py --pack."""
import base64
import bz2
import linecache
import os

READABLE_SOURCE = bz2.decompress(base64.b85decode("'''
# linecache looks for the lines of a class in __file__, for those of a function where it was
# compiled; entries without a time are never looked up on the disk.
TAIL = b""""))
READABLE_PATH = os.path.join(os.path.dirname(__file__), "train_gpt_readable.py")
LINES = [line.decode() for line in READABLE_SOURCE.splitlines(True)]
for name in (READABLE_PATH, __file__):
    linecache.cache[name] = (len(READABLE_SOURCE), None, LINES, name)
exec(compile(READABLE_SOURCE, READABLE_PATH, "exec"))
"""
BASE85 = rb"[0-9A-Za-z!#$%&()*+;<=>?@^_`{|}~-]*"  # neither a quote nor a backslash
TEXT_LIMIT = 1 << 26  # bytes of text


def pack(source: bytes) -> bytes:
    """The packed form of a script's text."""
    return HEAD + base64.b85encode(bz2.compress(source)) + TAIL


def unpack(packed: bytes) -> bytes | None:
    """The text that a packed script carries, without running it; None if it is no packed script.

    Not one byte may differ from what `pack` writes around the compressed text, of which nothing
    may be left over.
    """
    found = re.fullmatch(re.escape(HEAD) + b"(" + BASE85 + b")" + re.escape(TAIL), packed)
    if found is None:
        return None
    stream = bz2.BZ2Decompressor()
    try:
        text = stream.decompress(base64.b85decode(found[1]), TEXT_LIMIT)
    except (OSError, ValueError):
        return None
    return text if stream.eof and not stream.unused_data else None


def text_of(script: Path) -> bytes:
    """The text of a script, packed or not."""
    data = script.read_bytes()
    text = unpack(data)
    return data if text is None else text


def fault(script: Path) -> str:
    """What is wrong with a script and the readable text beside it; "" if nothing is."""
    beside, text = script.with_name(READABLE), unpack(script.read_bytes())
    if text is None:
        return f"is not the packed form of {READABLE} beside it" if beside.exists() else ""
    if not beside.exists():
        return f"is packed, and {READABLE}, its text, is not beside it"
    return "" if text == beside.read_bytes() else f"unpacks to another text than {READABLE} beside"
