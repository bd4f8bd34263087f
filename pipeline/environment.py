"""Environment variables that are not settings although they look like ours: others' own, and mistakes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Final

from pipeline.errors import ConfigError
from pipeline.kafka.security import PREFIX

_KAFKA: Final = f"{PREFIX}KAFKA_"
# What Kubernetes tells every pod about each Service, and Docker about a link; for a Service named `agent-metadata` or
# `agent-metadata-serve` it has our prefix. Source: pkg/kubelet/envvars/envvars.go.
_PORT_URL: Final = re.compile(r"(tcp|udp|sctp)://")
_PORT_NAME: Final = re.compile(r".+_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
_SERVICE_NAME: Final = re.compile(r"(.+?)_SERVICE_(HOST|PORT(_.+)?)")


def service_links(environment: Mapping[str, str]) -> list[str]:
    """Return the variables with our prefix that Kubernetes has injected.

    Guarantee: a mistyped setting is not among them. Kubernetes sets a Service's host and port together, so
    AGENT_METADATA_SERVICE_HOST alone is SERVE_HOST, mistyped.
    """
    return [name for name in environment if name.startswith(PREFIX) and _is_service_link(name, environment)]


def _is_service_link(name: str, environment: Mapping[str, str]) -> bool:
    if _PORT_NAME.fullmatch(name) or (name.endswith("_PORT") and _PORT_URL.match(environment[name])):
        return True
    service = _SERVICE_NAME.fullmatch(name)
    return service is not None and {f"{service[1]}_SERVICE_HOST", f"{service[1]}_SERVICE_PORT"} <= environment.keys()


def refuse_misnamed(environment: Mapping[str, str], variables: Iterable[str]) -> None:
    """Refuse variables that are meant for us and would be ignored; `variables` are those that are read.

    One with the prefix must be among them, or injected. One of Kafka's without the prefix must be another program's:
    then the one with the prefix is set as well.

    Raises:
        ConfigError: names them, and no value.
    """
    known = set(variables)
    unknown = [name for name in environment if name.startswith(PREFIX) and name not in known]
    for name in sorted(set(unknown) - set(service_links(environment))):
        raise ConfigError(f"{name} is not a setting{nearest(name, known)}")
    bare = {variable.removeprefix(PREFIX): variable for variable in sorted(known) if variable.startswith(_KAFKA)}
    if ignored := [name for name in bare if environment.get(name) and bare[name] not in environment]:
        raise ConfigError(
            f"{', '.join(ignored)} would be ignored, as the prefix {PREFIX} is missing: "
            f"set {', '.join(bare[name] for name in ignored)}; what another program needs may stay set as well"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: which one was probably meant."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)
    return f"; did you mean {near[0]}?" if near else ""
