"""A range of a topic -> Postgres, again: beside the live pipeline, and only over older rows."""
