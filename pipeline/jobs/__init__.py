"""What an operator runs once, without its output."""
