"""Preference alignment of language models: a recipe describes a run, TRL trains it, alignlab measures what came out."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_FACE = {"load_recipe": "recipe", **dict.fromkeys(("train_sft", "train_dpo", "train_kto", "train_orpo"), "train")}


def __getattr__(name: str) -> Any:
    """`alignlab.train_kto` and what else is for use from Python, imported when it is asked for."""
    if name not in _FACE:
        raise AttributeError(f"module 'alignlab' has no attribute {name!r}")
    return getattr(importlib.import_module(f"alignlab.{_FACE[name]}"), name)
