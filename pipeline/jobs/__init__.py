"""What an operator runs once: status, why, redrive, shadow; cli/ has their options and output."""
