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


def open_pairs(samples: Sequence[Sample], partition: int) -> int | None:
    """Return a partition's open pairs; None if no worker's metrics say."""
    values = [
        value
        for name, labels, value in samples
        if name == "agent_metadata_open_pairs" and labels.get("partition") == str(partition)
    ]
    return int(max(values)) if values else None
