"""Preferences made by models: pairs from a run's own replies, replies revised by a constitution, round after round."""
