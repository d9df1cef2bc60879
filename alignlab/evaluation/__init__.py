"""Models judged and measured side by side on the same held-out prompts → `eval.json`."""
