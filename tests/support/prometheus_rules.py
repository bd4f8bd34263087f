"""Prometheus's naming rules (prometheus.io/docs/practices/naming), as far as they can be checked."""

import re

from prometheus_client.parser import text_string_to_metric_families

RESERVED_ENDINGS = ("_total", "_sum", "_count", "_bucket", "_created", "_info")
# Base units only: no milliseconds, minutes, kilobytes, percent.
OTHER_UNITS = re.compile(
    r"_(ms|millis|milliseconds|us|microseconds|minutes|hours|kb|kilobytes|mb|megabytes|percent)(_|$)"
)


def families(text):
    """Parse an exposition; return its families without the `_created` gauges of Python's client."""
    return [family for family in text_string_to_metric_families(text) if not family.name.endswith("_created")]


def breaches(text):
    """Return how an exposition breaks the rules, one line for each."""
    problems = []
    for family in families(text):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", family.name):
            problems.append(f"{family.name}: characters")
        if family.type not in ("counter", "gauge", "histogram"):
            problems.append(f"{family.name}: is a {family.type}")
        if not family.documentation:
            problems.append(f"{family.name}: no help")
        if OTHER_UNITS.search(family.name):
            problems.append(f"{family.name}: no base unit")
        if family.name.endswith(RESERVED_ENDINGS):
            problems.append(f"{family.name}: ends as a {family.type} must not")
        if family.type == "counter":
            problems += [f"{s.name}: no _total" for s in family.samples if not s.name.endswith(("_total", "_created"))]
        for sample in family.samples:
            problems += [f"{family.name}: label {label}" for label in sample.labels if label not in KNOWN_LABELS]
    return problems


# Each bounded: by the code, by the topic's partitions, or by the buckets.
KNOWN_LABELS = {"reason", "hop", "service", "topic", "partition", "le"}
