"""Structs made for a mapping: of the fields that it names, nested as its paths are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import NODEFAULT

from pipeline.formats.mapping.paths import Missing, Path

Get = Callable[[Any], Any]
HEAD: Final = "head"  # the struct's field that holds the agent's id
# Begins the names in JSON of fields that nothing is decoded into; a record that has such a name achieves nothing.
_UNNAMED: Final = "\ue000"


class NoFastWay(Exception):
    """Structs can't follow these paths."""


class Slot(NamedTuple):
    """A field to decode: its name in the report, where it is, its type, and its default, if it may be missing."""

    name: str
    steps: tuple[str, ...]
    type: Any
    default: Any = NODEFAULT


def steps_of(path: Path | None, *, may_be_root: bool = False) -> tuple[str, ...]:
    """Return the names that lead to a field of the record's value.

    Raises:
        NoFastWay: the path leads elsewhere, or through a list.
    """
    if path is None or path.source != "value" or any(step.isdecimal() for step in path.steps):
        raise NoFastWay
    if not path.steps and not may_be_root:
        raise NoFastWay
    return path.steps


def getter(slot: Slot, places: dict[str, str]) -> Get:
    """Return what takes a slot's value from a decoded struct; its default where a struct above it is missing."""
    place, default = places[slot.name], slot.default
    get = attrgetter(place)
    if default is NODEFAULT or "." not in place:
        return get

    def get_or_default(struct: Any) -> Any:
        try:
            return get(struct)
        except AttributeError:
            return default

    return get_or_default


def inside_getter(slot: Slot, depth: int) -> Get:
    """Return what takes a slot's value from an object that is `depth` steps along its path; None if it is missing."""
    path = Path("", slot.steps[depth:])

    def get(fields: dict[str, Any]) -> Any:
        found = path.find(fields)
        return None if isinstance(found, Missing) else found

    if len(path.steps) == 1:
        name = path.steps[0]
        return lambda fields: fields.get(name)
    return get


def head_setter(head: list[Slot], places: dict[str, str], *, is_moment: bool) -> Callable[[Any, Any], None] | None:
    """Return what sets a report's agent and time, in half the time that it takes in general.

    Shape: `head` are the slots of one id and perhaps a time, which is a moment already, and beside the id or in its
    place; None for any other.
    """
    agent, *others = head
    moved = [slot for slot in others if places[slot.name] != slot.name]
    if (others and not is_moment) or any(slot.steps[:-1] != agent.steps[:-1] for slot in moved):
        return None
    get: Callable[[Any], Any] = attrgetter(places[agent.name], *(places[slot.name] for slot in moved))

    def set_agent(report: Any, _fields: Any) -> None:
        agent_id = get(report)
        report.agent_id = agent_id if agent_id.__class__ is str else str(agent_id)

    def set_both(report: Any, _fields: Any) -> None:
        agent_id, report.collected_at = get(report)
        report.agent_id = agent_id if agent_id.__class__ is str else str(agent_id)

    return set_both if moved else set_agent


def make_struct(
    slots: Iterable[Slot], virtual: dict[str, Any], depth: int = 0
) -> tuple[type[msgspec.Struct], dict[str, str]]:
    """Make a struct of these fields, nested as their steps say; return it, and where each is, as attrgetter() says it.

    A field gets its slot's name. At the top, and where the agent's id is, what is missing of `virtual` is added, with
    its default: either may serve as the report.
    """
    groups: dict[str, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(slot.steps[depth], []).append(slot)
    fields: list[tuple[str, Any, Any]] = []
    rename, places = {}, {}
    for number, (step, group) in enumerate(groups.items()):
        if any(len(slot.steps) == depth + 1 for slot in group):
            if len(group) > 1:
                raise NoFastWay  # two paths lead to the same field, or one into what the other takes
            slot = group[0]
            name = places[slot.name] = slot.name
            fields.append((name, slot.type, slot.default))
        else:
            name = HEAD if any(slot.name == "agent_id" for slot in group) else f"at{number}"
            inner, inner_places = make_struct(group, virtual if name == HEAD else {}, depth + 1)
            is_optional = all(slot.default is not NODEFAULT for slot in group)
            fields.append((name, inner | None, None) if is_optional else (name, inner, NODEFAULT))
            places.update({slot: f"{name}.{place}" for slot, place in inner_places.items()})
        rename[name] = step
    for name, default in virtual.items():
        if name not in rename:
            fields.append((name, Any, default))
            rename[name] = _UNNAMED + name
    try:
        return msgspec.defstruct("Decoded", fields, rename=rename, kw_only=True, gc=False), places
    except ValueError:
        raise NoFastWay from None  # a name that JSON would escape
