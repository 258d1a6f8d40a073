# SPDX-License-Identifier: Apache-2.0
"""YAML files whose every value knows its line.

- :func:`load`: reads a file into :class:`Node` objects and says what is wrong with it.
- :class:`Node`: a value with its place; a mapping also knows the place of each key.
- :func:`scalar`: what a word without quotes means.

The YAML is plain on purpose: no anchors and aliases, no tags, one document. Unquoted words mean what they look like:
only ``true``, ``false``, ``null``, ``~`` and decimal numbers are not text (``no``, ``on``, ``0101``, ``12:30`` are).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import yaml

from bednet.errors import Place, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

MAX_FILE_BYTES = 32 * 1024 * 1024
"""A devices.yml with half a million devices is smaller."""

MAX_DEPTH = 32
"""Levels of nesting; the schemas need five."""

Scalar: TypeAlias = str | int | float | bool | None
Plain: TypeAlias = "Scalar | list[Plain] | dict[str, Plain]"

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]")
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]{0,17})\.[0-9]{1,17}")
_WORDS: Mapping[str, Scalar] = {"true": True, "false": False, "null": None, "~": None, "": None}

_NO_ALIAS = "write the value out where it is used, in quotes when it is text that begins with * or &"

# libyaml's parser is some ten times faster than the one in Python; both emit the same events.
_Parser: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Node:
    """A value of a YAML file and where it begins.

    :ivar value: a scalar, a tuple of nodes (a list) or a dict of nodes.
    :ivar keys: where each key of a mapping stands; empty for others.
    """

    value: Scalar | tuple[Node, ...] | dict[str, Node]
    place: Place
    keys: Mapping[str, Place] = field(default_factory=dict)

    def plain(self) -> Plain:
        """Return the value as Python's own lists, dicts and scalars."""
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return self.value

    def get(self, key: str) -> Node | None:
        """Return the node under `key` when this is a mapping that has it."""
        return self.value.get(key) if isinstance(self.value, dict) else None

    def items(self) -> Iterator[tuple[str, Node]]:
        """Go through a mapping; through nothing when this is none."""
        yield from self.value.items() if isinstance(self.value, dict) else ()

    def elements(self) -> tuple[Node, ...]:
        """Return the elements of a list; nothing when this is none."""
        return self.value if isinstance(self.value, tuple) else ()

    def at(self, path: Sequence[str | int]) -> Node:
        """Follow keys and indexes as far as they lead."""
        node = self
        for step in path:
            if isinstance(node.value, dict) and step in node.value:
                node = node.value[str(step)]
            elif isinstance(node.value, tuple) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
            else:
                break
        return node


def scalar(text: str) -> Scalar:
    """Return what a word without quotes means."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _DECIMAL.fullmatch(text) else text


class _StopReadingError(Exception):
    """The rest of the file cannot be understood; the problem is already noted."""


class _Composer:
    """Builds nodes from parser events, down to a depth that no honest file reaches; follows no alias."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self._events = yaml.parse(text, Loader=_Parser)

    def refuse(self, place: Place, code: str, message: str, cure: str) -> None:
        self.problems.append(Problem(place, code, message, cure))

    def _place(self, event: yaml.Event) -> Place:
        return Place(self.file, event.start_mark.line + 1 if event.start_mark else 1)

    def document(self) -> Node | None:
        """Return the root of the only document, None when there is none."""
        root: Node | None = None
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent) and root is not None:
                cure = "keep everything in one document and take this '---' out"
                self.refuse(self._place(event), "yaml-documents", "a second document begins here ('---')", cure)
                raise _StopReadingError
            if isinstance(event, yaml.NodeEvent):
                root = self._node(event, depth=0)
        return root

    def _node(self, event: yaml.Event, depth: int) -> Node:
        place = self._place(event)
        if isinstance(event, yaml.AliasEvent):
            self.refuse(place, "yaml-alias", f"'*{event.anchor}' refers to another value", _NO_ALIAS)
            return Node(None, place)
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            self.refuse(place, "yaml-alias", f"'&{event.anchor}' names a value for use elsewhere", _NO_ALIAS)
        if (tag := getattr(event, "tag", None)) is not None:
            self.refuse(place, "yaml-tag", f"the YAML tag '{tag}' is not used here", "write the plain value")
        if depth > MAX_DEPTH:
            message = f"nested more than {MAX_DEPTH} levels deep"
            self.refuse(place, "yaml-depth", message, "check brackets and indentation")
            raise _StopReadingError
        if isinstance(event, yaml.ScalarEvent):
            return Node(self._scalar(event), place)
        if isinstance(event, yaml.SequenceStartEvent):
            elements: list[Node] = []
            while not isinstance(inner := next(self._events), yaml.SequenceEndEvent):
                elements.append(self._node(inner, depth + 1))
            return Node(tuple(elements), place)
        return self._mapping(place, depth)

    def _mapping(self, place: Place, depth: int) -> Node:
        values: dict[str, Node] = {}
        keys: dict[str, Place] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._node(event, depth + 1)
            value = self._node(next(self._events), depth + 1)
            if not isinstance(key.value, str):
                shown = "a list or mapping" if isinstance(key.value, tuple | dict) else repr(key.value)
                self.refuse(key.place, "yaml-key", f"a key must be text, not {shown}", "put the key in quotes")
            elif key.value in keys:
                first = keys[key.value].line
                message = f"the key {key.value!r} stands here again; it stands in line {first} already"
                self.refuse(key.place, "duplicate-key", message, "remove one of the two, or join their values")
            else:
                values[key.value] = value
                keys[key.value] = key.place
        return Node(values, place, keys)

    @staticmethod
    def _scalar(event: yaml.ScalarEvent) -> Scalar:
        text: str = event.value
        return scalar(text) if event.implicit[0] else text


def _decode(file: str, raw: bytes) -> tuple[str, list[Problem]]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        message = f"byte 0x{raw[error.start]:02X} is not UTF-8"
        return "", [Problem(Place(file, line), "not-utf8", message, "save the file in the encoding UTF-8")]
    if found := _CONTROL.search(text):
        line = text.count("\n", 0, found.start()) + 1
        message = f"the invisible character U+{ord(found[0]):04X}"
        return "", [Problem(Place(file, line), "yaml-control", message, "delete it; YAML does not allow it")]
    return text, []


def _syntax_problem(file: str, text: str, error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    place = Place(file, line)
    lines = text.splitlines() or [""]
    here = lines[min(line, len(lines)) - 1]
    if "\t" in here[: len(here) - len(here.lstrip())]:
        return Problem(place, "yaml-tab", "a tab, where YAML wants spaces", "indent with spaces only")
    message = f"not valid YAML: {error.problem or error}"
    if error.context and error.context_mark and error.context_mark.line + 1 != line:
        message += f", {error.context} that begins in line {error.context_mark.line + 1}"
    cure = "check indentation, quotes and brackets in this line and the one before"
    if "{device." in here:
        cure = 'put each topic with {...} in quotes, as in ["sensors/{device.id}/#"]'
    return Problem(place, "yaml-syntax", message, cure)


def load(path: Path) -> tuple[Node | None, list[Problem]]:  # noqa: PLR0911 - one for each refusal
    """Read a YAML file whose top level is a mapping.

    :returns: the root, and all problems found. The root is None when nothing can be made of the file; otherwise it
        is as complete as the problems allow, so that further checks can go on and report more.
    """
    file = str(path)
    start = Place(file, 1)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None, [Problem(start, "file-missing", "there is no such file", "create it; see docs/policy.md")]
    except OSError as error:
        message = f"the file cannot be read ({error.strerror})"
        return None, [Problem(start, "file-unreadable", message, "make it a file that you may read")]
    if len(raw) > MAX_FILE_BYTES:
        message = f"the file is larger than {MAX_FILE_BYTES // 1024 // 1024} MiB"
        cure = "check that it is the right file; longer lists of devices go into a devices.csv or devices.jsonl"
        return None, [Problem(start, "file-too-large", message, cure)]
    text, problems = _decode(file, raw)
    if problems:
        return None, problems
    composer = _Composer(file, text)
    try:
        root = composer.document()
    except _StopReadingError:
        return None, composer.problems
    except yaml.MarkedYAMLError as error:
        return None, [*composer.problems, _syntax_problem(file, text, error)]
    if any(problem.code == "yaml-alias" for problem in composer.problems):
        return None, composer.problems  # the values are not there to be checked
    if root is None or (root.value is None and not composer.problems):
        return None, [
            Problem(start, "file-empty", "the file is empty", "begin it with 'version: 1'; see docs/policy.md")
        ]
    if not isinstance(root.value, dict):
        message = "the file must be a mapping ('key: value' lines) at its top level"
        return None, [*composer.problems, Problem(root.place, "wrong-type", message, "begin it with 'version: 1'")]
    return root, composer.problems
