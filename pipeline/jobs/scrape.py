"""Read what the roles' own /metrics say."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping, Sequence
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

_SCRAPE_SECONDS: Final = 2.0

Sample = tuple[str, Mapping[str, str], float]


def scrape(urls: Sequence[str]) -> list[Sample]:
    """Read (name, labels, value) of the roles' metrics; roles that don't answer are left out."""
    samples: list[Sample] = []
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=_SCRAPE_SECONDS) as answer:  # noqa: S310  # http(s), checked before
                text = answer.read().decode()
        except OSError:
            continue
        for family in text_string_to_metric_families(text):
            samples += [(sample.name, sample.labels, sample.value) for sample in family.samples]
    return samples


def highest(samples: Sequence[Sample], metric: str) -> float | None:
    """Return a metric's highest value; None if no role has it."""
    return max((value for name, _, value in samples if name == metric), default=None)


def outages(samples: Sequence[Sample]) -> dict[str, float] | None:
    """Return how many seconds ago each service that is unavailable to a role became so; None if no role says.

    Less than a second is how long services take to answer, and no outage.
    """
    found: dict[str, float] = {}
    for name, labels, seconds in samples:
        if name == "agent_metadata_outage_seconds":
            found[labels["service"]] = max(seconds, found.get(labels["service"], 0.0))
    return {service: seconds for service, seconds in found.items() if seconds >= 1} if found else None


def open_pairs(samples: Sequence[Sample], partition: int) -> int | None:
    """Return a partition's open pairs; None if no worker's metrics say."""
    values = [
        value
        for name, labels, value in samples
        if name == "agent_metadata_open_pairs" and labels.get("partition") == str(partition)
    ]
    return int(max(values)) if values else None
