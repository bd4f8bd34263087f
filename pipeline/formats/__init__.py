"""What a record of the events topic may hold, from its bytes to reports."""
