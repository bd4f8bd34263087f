"""A range of a topic -> Postgres, again; beside the live pipeline, by the strict guard."""
