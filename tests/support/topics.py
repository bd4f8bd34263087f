"""Topics deleted and created again."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from pipeline.kafka.topics import TopicSpec, create_topics, delete_topics
from tests.support.deployment import eventually


async def recreate_topics(client_config: Mapping[str, Any], specs: Mapping[str, TopicSpec]) -> None:
    """Delete topics and create each again, under a new id, as soon as Kafka has removed the old one."""
    await asyncio.to_thread(delete_topics, client_config, specs)
    missing = dict(specs)

    async def all_are_new() -> bool:
        for name in await asyncio.to_thread(create_topics, client_config, missing):
            missing.pop(next(role for role, spec in missing.items() if spec.name == name))
        return not missing

    await eventually("the topics are recreated", all_are_new)
