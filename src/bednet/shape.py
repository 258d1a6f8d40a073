# SPDX-License-Identifier: Apache-2.0
"""The shape of a site's files: JSON Schema (2020-12), told in plain sentences.

- :func:`check_shape`: compares a file with its schema, a package resource under ``schemas/``.
- :func:`did_you_mean`: the end of a cure for a misspelt word.

The ``description`` of a schema is the second half of the sentence "write ...", so it is part of our messages.
"""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import itertools
import json
from typing import TYPE_CHECKING, Any

from jsonschema import Draft202012Validator

from bednet.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from jsonschema import ValidationError

    from bednet.errors import Place
    from bednet.yamlfile import Node


_MOST_COMPARED = 20_000
"""To look for a near word takes some 10 microseconds for each that is known; a site may have a million devices."""


@functools.cache
def _validator(name: str) -> Draft202012Validator:
    text = (importlib.resources.files("bednet") / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8")
    return Draft202012Validator(json.loads(text))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'? `` for the nearest known word, an empty string when none is near."""
    known = list(itertools.islice(known, _MOST_COMPARED))
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:
        lower = {candidate.lower(): candidate for candidate in known}
        near = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.6)
        near = [lower[candidate] for candidate in near]
    return f"did you mean '{near[0]}'? " if near else ""


def _kind(node: Node) -> str:
    value = node.value
    if value is None:
        return "empty"
    if isinstance(value, tuple):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) else f"the number {value}"


def _subject(root: Node, path: list[str | int]) -> str:
    """Name what a path leads to: "device 'temp-101': 'roles'"."""
    owner = ""
    match path:
        case ["devices", int(index), *_]:
            name = root.at(path[:2]).get("id")
            owner = f"device {name.value!r}" if name and isinstance(name.value, str) else f"device number {index + 1}"
        case ["roles", str(role), *_]:
            owner = f"role {role!r}"
        case ["rules", int(index), *_]:
            name = root.at(path[:2]).get("name")
            owner = f"rule {name.value!r}" if name and isinstance(name.value, str) else f"rule number {index + 1}"
        case ["issuers", int(index), *_]:
            name = root.at(path[:2]).get("name")
            owner = f"issuer {name.value!r}" if name and isinstance(name.value, str) else f"issuer number {index + 1}"
        case ["tests", int(index), *_]:
            owner = f"test number {index + 1}"
    rest = path[2:] if owner else path
    keys = "/".join(step for step in rest if isinstance(step, str))
    element = f"element {rest[-1] + 1} of " if rest and isinstance(rest[-1], int) else ""
    return ": ".join(part for part in (owner, f"{element}'{keys}'" if keys else "") if part)


def _twice(node: Node) -> Node:
    seen: list[object] = []
    for element in node.elements():
        plain = element.plain()
        if plain in seen:
            return element
        seen.append(plain)
    return node


def _choice(node: Node, prefix: str, schema: dict[str, Any], kind: str) -> tuple[str, str, str]:
    """Say what is wrong where one of two keys must be there, or exactly one (``oneOf``)."""
    one, other = (choice["required"][0] for choice in schema[kind])
    if kind == "oneOf" and node.get(one) is not None:
        return "one-of-two", f"{prefix}both '{one}' and '{other}'", "take one of them out"
    cure = "add one of them" if kind == "oneOf" else "add one of them, or both"
    return "missing-key", f"{prefix}neither '{one}' nor '{other}'", cure


def _translate(root: Node, error: ValidationError) -> Iterator[tuple[Place, str, str, str]]:
    path: list[str | int] = list(error.absolute_path)
    node = root.at(path)
    schema: dict[str, Any] = error.schema if isinstance(error.schema, dict) else {}
    what = str(schema.get("description", "what docs/policy.md says"))
    subject = _subject(root, path)
    prefix = f"{subject}: " if subject else ""
    if "propertyNames" in error.absolute_schema_path:
        key = str(error.instance)
        yield node.keys[key], "bad-name", f"{prefix}{key!r} is not a valid name", f"write {what}"
        return
    match error.validator:
        case "additionalProperties":
            known = list(schema["properties"])
            for key, place in node.keys.items():
                if key not in known:
                    cure = f"{did_you_mean(key, known)}The keys here are: {', '.join(known)}"
                    yield place, "unknown-key", f"{prefix}unknown key {key!r}", cure
        case "required":
            # One error per key, each with the whole list: the caller keeps the first.
            missing = [key for key in schema["required"] if node.get(key) is None]
            described = [f"'{key}' ({schema['properties'][key].get('description', key)})" for key in missing]
            names = ", ".join(f"'{key}'" for key in missing)
            yield node.place, "missing-key", f"{prefix}{names} missing", f"add {' and '.join(described)}"
        case "const":
            message = f"{subject} is {_kind(node)}"
            yield node.place, "version", message, f"write {what}; other versions need another bednet"
        case "enum":
            near = did_you_mean(node.value, schema["enum"]) if isinstance(node.value, str) else ""
            yield (
                node.place,
                "bad-value",
                f"{subject} is {_kind(node)}",
                f"{near}Write {what}" if near else f"write {what}",
            )
        case "uniqueItems":
            twice = _twice(node)
            yield twice.place, "listed-twice", f"{subject} contains {twice.plain()!r} twice", "remove one of the two"
        case "anyOf" | "oneOf" as kind:
            yield node.place, *_choice(node, prefix, schema, kind)
        case "maxItems":
            message = f"{subject} has {len(node.elements())} elements, and {schema['maxItems']} are the most"
            yield node.place, "too-many", message, "split the rule in two"
        case "pattern":
            yield node.place, "bad-name", f"{subject} is {_kind(node)}, which is not a valid name", f"write {what}"
        case _:
            yield node.place, "wrong-type", f"{subject} is {_kind(node)}", f"write {what}"


def check_shape(name: str, root: Node) -> list[Problem]:
    """Compare a file with the schema called `name` (``devices`` or ``policy``)."""
    problems: dict[tuple[Place, str, str], Problem] = {}
    for error in _validator(name).iter_errors(root.plain()):
        for place, code, message, cure in _translate(root, error):
            problems.setdefault((place, code, message), Problem(place, code, message, cure))
    return list(problems.values())
