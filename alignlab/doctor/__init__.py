"""The doctor: what is wrong with preference data, said before an hour of GPU is spent on it."""
