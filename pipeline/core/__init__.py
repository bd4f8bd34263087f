"""What the data is and how it merges: no I/O, no clock, no client library."""
