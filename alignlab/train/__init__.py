"""Recipe → run, by TRL."""
