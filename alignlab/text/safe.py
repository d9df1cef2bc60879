"""Foreign text made safe to show: on a terminal, on a page, in JSON; imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

# What could act on a page instead of standing on it: control characters but tab and newline, marks that turn the
# direction of text or hide, tags, and what UTF-8 cannot hold. Joiners stay: scripts and emoji need them.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)
PATH = re.compile(r"""(?:file://|(?<![\w.:/<\[]))~?(?:/[^\s/'"`,;:()<>|]+){2,}/?""")


def harmless(text: str) -> str:
    """The text with each character that acts instead of showing written out, as in `⟨U+202E⟩`."""
    return UNSAFE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """The same on one line."""
    return " ".join(harmless(text).split())


def harmless_json(value: Any) -> str:
    """The value as JSON on one line, in which such characters are escaped and so stay what they are."""
    return UNSAFE.sub(lambda found: json.dumps(found[0])[1:-1], json.dumps(value, ensure_ascii=False))


def publishable(text: str, secrets: Sequence[str] = ()) -> str:
    """The text with each absolute path cut down to its last part; `secrets` are paths that stand in it for certain."""
    for path in sorted(secrets, key=len, reverse=True):
        text = text.replace(path, Path(path).name)
    return PATH.sub(lambda found: Path(found[0]).name, text)


def paths_in(tree: Any) -> set[str]:
    """The absolute paths among the values of nested mappings and lists, those with spaces in them included."""
    if is_dataclass(tree) and not isinstance(tree, type):
        return paths_in(asdict(tree))
    if isinstance(tree, Mapping):
        return set().union(*map(paths_in, tree.values()))
    if isinstance(tree, list | tuple):
        return set().union(*map(paths_in, tree))
    is_path = isinstance(tree, str) and tree.startswith(("/", "~/")) and "\n" not in tree and len(tree) > 1
    return {tree.rstrip("/")} if is_path else set()
