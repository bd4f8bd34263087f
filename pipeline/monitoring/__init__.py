"""What a monitor sees of a process: metrics, lag, health, logs."""
