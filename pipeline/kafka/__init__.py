"""Every client of Kafka; knows no stage and no Settings."""
