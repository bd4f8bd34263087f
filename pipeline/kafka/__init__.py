"""What stages and jobs share of Kafka: clients, security, topics, dead letters; depends on no stage, nor on Settings.

The consumers of a stage are in its folder: worker/transport.py, sink/consumer_thread.py.
"""
