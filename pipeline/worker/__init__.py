"""Events topic -> windows -> batches topic.

Nothing is lost because of the order: publish all parts of a window, wait for Kafka's acknowledgements, then commit the
source offsets that the window stands for.

    app.py, transport.py   Faust, fed with chunks of records instead of single ones
    partition.py           folds chunks into the open window, and closes it on time, at capacity or when it must stop
    table.py               the open windows as a Faust table
    worker.py              publishes closed windows and commits; picks up and gives back partitions
"""

from pipeline.worker.worker import Worker

__all__ = ["Worker"]
