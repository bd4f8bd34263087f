"""Rows -> browsers: the HTTP API, event streams, the live page."""
