"""Events topic -> windows -> batches topic.

Nothing is lost because of the order: publish all parts of a window, wait for Kafka's acknowledgements, then commit the
source offsets that the window stands for.
"""

from pipeline.worker.worker import Worker

__all__ = ["Worker"]
