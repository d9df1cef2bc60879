"""How much memory and disk a recipe takes, before it starts: its real steps on tensors without content."""
