"""What runs in one process until it is told to stop."""
