"""Preference alignment of language models: a recipe describes a run, TRL trains it, alignlab measures what came out."""

__version__ = "0.1.0"
