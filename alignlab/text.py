"""Foreign text made safe to show: on a terminal, on a page, in JSON; imports no torch."""

from __future__ import annotations

import json
import re
from typing import Any

# What could act on a page instead of standing on it: control characters but tab and newline, marks that turn the
# direction of text or hide, tags, and what UTF-8 cannot hold. Joiners stay: scripts and emoji need them.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)


def harmless(text: str) -> str:
    """The text with each character that acts instead of showing written out, as in `⟨U+202E⟩`."""
    return UNSAFE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """The same on one line."""
    return " ".join(harmless(text).split())


def harmless_json(value: Any) -> str:
    """The value as JSON on one line, in which such characters are escaped and so stay what they are."""
    return UNSAFE.sub(lambda found: json.dumps(found[0])[1:-1], json.dumps(value, ensure_ascii=False))
