"""Everything that decides what preparing makes of rows, as plain facts: the key under which it is cached."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from alignlab.data.format import Format
from alignlab.data.rows import Part
from alignlab.recipe.load import DataSection

PREPARING = (
    *("files", "format", "layouts", "account", "messages", "pairing", "preparation", "rows", "splits", "toy"),
    *("transcript", "words"),
)
LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")
ELSEWHERE = (
    "path",
    "subset",
    "config",
    "columns",
    "source",
    "sft",
    "toy",
)  # said by the parts themselves, or read by somebody else


def identify(section: DataSection, form: Format, parts: Sequence[Part], more: Any) -> dict[str, Any] | None:
    """The facts, as plain JSON; none where the tokenizer cannot be told by its content. Reads every file once."""
    backend = getattr(form.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = backend.to_str()
    tokens = state[state.index('"added_tokens"') :]  # behind the padding and truncation of the last call
    settings = {name: value for name, value in asdict(section).items() if name not in ELSEWHERE}
    is_toy = any(part.source == "toy" for part in parts)
    return {
        "rows": [_identify_part(part) for part in parts],
        "settings": settings | ({"toy": asdict(section.toy)} if is_toy else {}),
        "tokenizer": [type(form.tokenizer).__name__, xxhash.xxh3_128_hexdigest(tokens.encode()), form.eos],
        "bos": form.tokenizer.bos_token,
        "template": form.chat_template if form.name == "chat" else None,
        "more": xxhash.xxh3_128_hexdigest(repr(more).encode()),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "code": _code(),
    }


def _identify_part(part: Part) -> list[Any]:
    read = part.reader and [part.reader.source, sorted(part.reader.columns.items())]
    return [part.split, sorted(part.brought), sorted(part.row_splits.items()), read, part.digest()]


@cache
def _code() -> str:
    """A hash of the modules that prepare, so that a change in one leaves older entries unread."""
    content = xxhash.xxh3_128()
    for name in PREPARING:
        content.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return content.hexdigest()
