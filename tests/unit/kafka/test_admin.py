import socket

import pytest

from pipeline.errors import ServiceUnavailable
from pipeline.kafka.admin import KafkaAdmin

QUESTIONS = {
    "topic_id": lambda admin: admin.topic_id("events", 1.0),
    "offsets": lambda admin: admin.offsets("events", [0], 1.0),
}


def connections(server):
    """Count the clients that have connected so far, closing each connection."""
    server.setblocking(False)
    count = 0
    while True:
        try:
            server.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


@pytest.mark.parametrize("question", QUESTIONS)
async def test_silent_broker_is_asked_again_by_a_new_client(question):
    with socket.create_server(("127.0.0.1", 0)) as server:  # the kernel accepts, and nobody answers
        admin = KafkaAdmin({"bootstrap.servers": f"127.0.0.1:{server.getsockname()[1]}"})
        for _ in range(2):
            with pytest.raises(ServiceUnavailable):
                await QUESTIONS[question](admin)
        assert connections(server) >= 2
