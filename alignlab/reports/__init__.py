"""Run directories → one HTML page, and the same facts as JSON beside it."""
