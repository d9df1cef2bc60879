"""What a run leaves behind: its directory, its manifest, and the facts read back from them."""
