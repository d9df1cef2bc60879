"""Preference alignment of language models: a recipe describes a run, TRL trains it, alignlab measures what came out."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

# Where each function of the public face is; a module is imported when its function is first asked for
PUBLIC = {"make_pairs": "alignlab.rounds.pairs", "run_rounds": "alignlab.rounds.rounds"}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'alignlab' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(PUBLIC[name]), name)
