"""What run directories say, read back and typed: runs, sweeps, evaluations and their logs."""
