"""A range of a topic -> Postgres, again: alongside the live pipeline, and only over older rows."""
