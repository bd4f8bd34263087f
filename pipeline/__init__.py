"""Live agent metadata, from a Kafka topic to Postgres and its listeners."""
