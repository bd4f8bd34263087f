"""What the stages and jobs share of Kafka: clients, security, topics, dead letters; no stage and no Settings in it.

The consumers of a stage are in its folder: worker/transport.py, sink/consumer_thread.py.
"""
