"""A recipe: YAML and overrides, checked, and what TRL gets of it."""
