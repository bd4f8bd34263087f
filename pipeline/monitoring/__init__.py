"""What monitoring sees of a process: metrics, lag, health, logs."""
