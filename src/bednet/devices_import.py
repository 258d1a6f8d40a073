# SPDX-License-Identifier: Apache-2.0
"""The devices of a site from lists that other programs write: ``devices.csv``, ``devices.json``, ``devices.jsonl``.

- :func:`load_devices`: reads all lists of a site's folder, ``devices.yml`` included, into one set of devices.
- :func:`read_entry`: makes a device of one entry, as a database hands it over.

A list may hold a million devices. Each entry is looked at quickly; one that is not surely in order is compared with the
schema, so that the messages are those for ``devices.yml``. docs/devices.md says what the lists look like.
"""

from __future__ import annotations

import csv
import importlib.resources
import itertools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from bednet.devices import Collector
from bednet.errors import Place, Problem
from bednet.shape import check_shape, did_you_mean
from bednet.yamlfile import Node, load, scalar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TextIO

    from bednet.devices import Device
    from bednet.yamlfile import Scalar

ATTRIBUTE_PREFIX = "attributes."
"""What begins the name of a column that holds an attribute."""

MOST_PROBLEMS = 1_000
"""After so many wrong entries the rest of a file is not read."""

LIST_COLUMNS = ("roles", "tags", "authentication", "key_types")

_SEPARATORS = (",", ";", "\t")
_LIST_SEPARATOR = re.compile(r"[\s,;|]+")
# The same as in a devices.yml, less line ends.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]")
_SPACE = re.compile(r"[ \t\r\n]*")
_CHUNK = 1 << 20
_LONGEST_ENTRY = 4 * _CHUNK
_MOST_KNOWN = 100_000
_CSV_CURE = "put text with separators, quotes or line ends in quotes, and double the quotes within it"


class _StopReadingError(Exception):
    """The rest of the file cannot be understood; the problem is already noted."""


def load_devices(folder: Path, problems: list[Problem]) -> dict[str, Device] | None:
    """Return the devices of a site by id, and add what is wrong with them to `problems`.

    :returns: None when a file could not be read to its end, so that devices may be missing.
    """
    collector = Collector(folder, problems)
    complete = True
    readers: dict[str, type[_List]] = {"devices.csv": _CSV, "devices.json": _JSON, "devices.jsonl": _JSONLines}
    lists = [reader(folder / name, collector) for name, reader in readers.items() if (folder / name).exists()]
    if not lists or (folder / "devices.yml").exists():
        root, found = load(folder / "devices.yml")
        problems += found
        complete = root is not None
        if root is not None:
            problems += check_shape("devices", root)
            collector.add_file(root)
    for reader in lists:
        complete = reader.read() and complete
    devices = collector.finish()
    return devices if complete else None


def read_entry(raw: bytes, file: str, folder: Path, problems: list[Problem]) -> Device | None:
    """Return the device of one JSON object, and add what is wrong with it by itself to `problems`.

    :param file: where it comes from, for messages.
    :param folder: the site's, for its ``csr/``.
    """
    collector = Collector(folder, problems)
    _Entry(file, collector, raw).read()
    return next(iter(collector.devices.values()), None)


class _List:
    """A file with devices."""

    def __init__(self, path: Path, collector: Collector) -> None:
        self.path = path
        self.file = str(path)
        self._collector = collector
        self._shape = _Shape()
        self._wrong = 0

    def read(self) -> bool:
        """Hand all devices to the collector; say whether the file could be read to its end."""
        try:
            for number, (line, entry) in enumerate(self.entries()):
                self._take(number, Place(self.file, line), entry)
        except _StopReadingError:
            return False
        except UnicodeDecodeError as error:
            found = Place(self.file, self._line_that_is_no_text())
            message = f"byte 0x{error.object[error.start]:02X} is not UTF-8"
            cure = "save the file in the encoding UTF-8 (in Excel: 'CSV UTF-8')"
            self._collector.problems.append(Problem(found, "not-utf8", message, cure))
            return False
        except OSError as error:
            message = f"the file cannot be read ({error.strerror})"
            cure = "make it a file that you may read"
            self._collector.problems.append(Problem(Place(self.file, 1), "file-unreadable", message, cure))
            return False
        return True

    def entries(self) -> Iterator[tuple[int, object]]:
        """Go through the devices: the line where each begins, and what is there."""
        raise NotImplementedError

    def refuse(self, line: int, code: str, message: str, cure: str) -> None:
        self._collector.problems.append(Problem(Place(self.file, line), code, message, cure))

    def stop(self, line: int, code: str, message: str, cure: str) -> NoReturn:
        self.refuse(line, code, message, cure)
        raise _StopReadingError

    def _take(self, number: int, place: Place, entry: object) -> None:
        problems = self._collector.problems
        before = len(problems)
        if not self._shape.is_sound(entry):
            root = _node({"version": 1, "devices": [entry]}, place)
            found = check_shape("devices", root)
            # The schema saw a list of one.
            here, there = "device number 1", f"device number {number + 1}"
            problems += [Problem(p.place, p.code, p.message.replace(here, there, 1), p.cure) for p in found]
        if isinstance(entry, dict):
            self._collector.add(entry, place)
        if len(problems) > before:
            self._count_wrong(place.line)

    def _count_wrong(self, line: int) -> None:
        self._wrong += 1
        if self._wrong >= MOST_PROBLEMS:
            message = f"{MOST_PROBLEMS} devices up to here are wrong"
            self.stop(line, "too-many-problems", message, "correct these first; the rest was not read")

    def _line_that_is_no_text(self) -> int:
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    return number
        return 1


def _node(value: object, place: Place) -> Node:
    """Return a value that was read from JSON or CSV as one that was read from YAML."""
    if isinstance(value, dict):
        return Node({key: _node(item, place) for key, item in value.items()}, place, dict.fromkeys(value, place))
    if isinstance(value, list):
        return Node(tuple(_node(item, place) for item in value), place)
    scalar_value: Any = value
    return Node(scalar_value, place)


class _Shape:
    """Says quickly that an entry has the right shape; what it does not know may be right all the same.

    :ivar keys: of an entry.
    """

    def __init__(self) -> None:
        text = (importlib.resources.files("bednet") / "schemas" / "devices.schema.json").read_text(encoding="utf-8")
        schema = json.loads(text)["$defs"]
        device = schema["device"]
        properties = device["properties"]
        self.keys = frozenset(properties)
        self._required = frozenset(device["required"])
        self._name = re.compile(schema["name"]["pattern"]).search
        self._attribute = re.compile(properties["attributes"]["propertyNames"]["pattern"]).search
        self._known_names: set[str] = set()
        self._known_attributes: set[str] = set()
        ways = self._choices(properties["authentication"])
        key_types = self._choices(properties["key_types"])
        enrolments, reasons, methods = (
            frozenset(properties[key]["enum"]) for key in ("enrolment", "revoked", "token_authentication")
        )
        self._checks: dict[str, Callable[[Any], bool]] = {
            "id": lambda value: isinstance(value, str),
            "location": self._is_name,
            "type": self._is_name,
            "roles": lambda value: self._is_list(value) and all(map(self._is_name, value)),
            "tags": lambda value: self._is_list(value) and all(map(self._is_name, value)),
            "attributes": self._are_attributes,
            "authentication": lambda value: self._is_list(value) and tuple(value) in ways,
            "key_types": lambda value: self._is_list(value) and tuple(value) in key_types,
            "enrolment": lambda value: isinstance(value, str) and value in enrolments,
            "until": lambda value: isinstance(value, str),
            "revoked": lambda value: isinstance(value, str) and value in reasons,
            "reinstated": lambda value: isinstance(value, str),
            "token_authentication": lambda value: isinstance(value, str) and value in methods,
        }

    @staticmethod
    def _choices(schema: dict[str, Any]) -> frozenset[tuple[str, ...]]:
        choices, least = schema["items"]["enum"], schema.get("minItems", 0)
        # In any order, but few: a list that is not among these is for the schema.
        return frozenset(words for size in range(least, 5) for words in itertools.permutations(choices, size))

    def is_sound(self, entry: object) -> bool:
        """Say that the schema would have nothing against an entry."""
        if not isinstance(entry, dict) or not self._required <= entry.keys() <= self.keys:
            return False
        checks = self._checks
        return all(key in checks and checks[key](value) for key, value in entry.items())

    @staticmethod
    def _is_list(value: object) -> bool:
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            return False
        return len(value) < 2 or len(set(value)) == len(value)  # noqa: PLR2004 - one is unique

    def _is_name(self, word: object) -> bool:
        if not isinstance(word, str):
            return False
        if word not in self._known_names:
            if not self._name(word):
                return False
            if len(self._known_names) < _MOST_KNOWN:
                self._known_names.add(word)
        return True

    def _are_attributes(self, attributes: object) -> bool:
        if not isinstance(attributes, dict):
            return False
        for name, value in attributes.items():
            if name not in self._known_attributes:
                if not self._attribute(name):
                    return False
                if len(self._known_attributes) < _MOST_KNOWN:
                    self._known_attributes.add(name)
            if not isinstance(value, str | int | float):
                return False
        return True


# ---------------------------------------------------------------------------------------------------------------------
# CSV
# ---------------------------------------------------------------------------------------------------------------------


class _Column(NamedTuple):
    """A column of a table.

    :ivar number: counted from 1.
    :ivar attribute: the name of the attribute that it holds; empty for other columns.
    """

    name: str
    number: int
    attribute: str
    is_list: bool


class _CSV(_List):
    """A table with a header (RFC 4180); the separator is a comma, a semicolon or a tab."""

    def entries(self) -> Iterator[tuple[int, object]]:
        with self.path.open(encoding="utf-8-sig", newline="") as stream:
            lines = self._checked(stream)
            first = next(lines, "")
            skipped = 0
            # Excel writes and understands this line.
            if first.strip().lower().startswith("sep="):
                first, skipped = next(lines, ""), 1
            if not first.strip():
                cure = "begin the file with the names of its columns, such as id,location,roles"
                self.stop(1, "file-empty", "the file is empty", cure)
            separator = max(_SEPARATORS, key=first.count)
            rows = csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True, skipinitialspace=True)
            columns: list[_Column] = []
            while True:
                line = rows.line_num + skipped + 1
                try:
                    row = next(rows, None)
                except csv.Error as error:
                    self.stop(line, "csv-syntax", f"the row that begins here is not valid CSV: {error}", _CSV_CURE)
                if row is None:
                    return
                if not columns:
                    columns = self._columns(row, line)
                elif any(row) and (entry := self._entry(row, columns, line)) is not None:
                    yield line, entry

    def _checked(self, stream: Iterable[str]) -> Iterator[str]:
        for number, line in enumerate(stream, 1):
            if found := _CONTROL.search(line):
                message = f"the invisible character U+{ord(found[0]):04X}"
                self.stop(number, "csv-control", message, "delete it")
            yield line

    def _columns(self, header: list[str], line: int) -> list[_Column]:
        known = sorted(self._shape.keys - {"attributes"})
        names = [name.strip() for name in header]
        columns = []
        wrong = False
        for number, name in enumerate(names, 1):
            if name and name in names[: number - 1]:
                message = f"the column {name!r} stands here twice"
                self.refuse(line, "column-twice", message, "remove one of the two, or join their cells")
            elif name and name not in known and not (name.startswith(ATTRIBUTE_PREFIX) and name != ATTRIBUTE_PREFIX):
                cure = f"{did_you_mean(name, known)}An attribute's column is called '{ATTRIBUTE_PREFIX}{name}'; "
                cure += f"the other columns are: {', '.join(known)}"
                self.refuse(line, "unknown-column", f"unknown column {name!r}", cure)
            else:
                attribute = name.removeprefix(ATTRIBUTE_PREFIX) if name not in known else ""
                columns.append(_Column(name, number, attribute, name in LIST_COLUMNS))
                continue
            wrong = True
        missing = [name for name in ("id", "location", "roles") if name not in names]
        if missing:
            listed = ", ".join(f"'{name}'" for name in missing)
            cure = "let the first line name the columns, separated by commas, semicolons or tabs"
            self.refuse(line, "missing-column", f"there is no column {listed}", cure)
        if missing or wrong:
            raise _StopReadingError
        return columns

    def _entry(self, row: list[str], columns: list[_Column], line: int) -> dict[str, object] | None:
        if len(row) != len(columns):
            message = f"this row has {len(row)} cells, and the header has {len(columns)}"
            self.refuse(line, "csv-ragged", message, _CSV_CURE)
            self._count_wrong(line)
            return None
        entry: dict[str, object] = {}
        attributes: dict[str, Scalar] = {}
        for column, cell in zip(columns, row, strict=True):
            text = cell.strip()
            if not text:
                continue
            if column.attribute:
                attributes[column.attribute] = scalar(text)
            elif not column.name:
                message = f"cell {column.number} is {text!r}, and its column has no name"
                self.refuse(line, "csv-ragged", message, "name the column in the first line, or empty the cell")
                self._count_wrong(line)
                return None
            elif column.is_list:
                entry[column.name] = [word for word in _LIST_SEPARATOR.split(text) if word]
            else:
                entry[column.name] = text
        # An empty cell is a list of none only where a list must be.
        entry.setdefault("roles", [])
        if attributes:
            entry["attributes"] = attributes
        return entry


# ---------------------------------------------------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------------------------------------------------


class _TwiceError(ValueError):
    """An object has the same key twice."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
_JSON_CURE = "check quotes, commas and brackets here and in the line before"


class _JSONLines(_List):
    """One object for each device, each in a line of its own."""

    def entries(self) -> Iterator[tuple[int, object]]:
        with self.path.open(encoding="utf-8-sig", newline="\n") as stream:
            for number, line in enumerate(stream, 1):
                text = line.strip()
                if not text:
                    continue
                try:
                    entry = _DECODER.decode(text)
                except _TwiceError as error:
                    self.stop(
                        number, "duplicate-key", f"the key {str(error)!r} stands here twice", "remove one of the two"
                    )
                except (ValueError, RecursionError) as error:
                    self.stop(number, "json-syntax", f"not valid JSON: {_said(error)}", _JSON_CURE)
                if not isinstance(entry, dict):
                    cure = 'write a device in each line: {"id": "temp-101", "location": "hall-1", "roles": ["sensor"]}'
                    self.stop(number, "wrong-type", "this line is not an object", cure)
                yield number, entry


class _Entry(_List):
    """One object that stands alone, wherever it comes from."""

    def __init__(self, file: str, collector: Collector, raw: bytes) -> None:
        super().__init__(Path(file), collector)
        self._raw = raw

    def entries(self) -> Iterator[tuple[int, object]]:
        try:
            entry = _DECODER.decode(self._raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            message = f"byte 0x{error.object[error.start]:02X} is not UTF-8"
            self.stop(self._raw.count(b"\n", 0, error.start) + 1, "not-utf8", message, "write JSON in UTF-8")
        except _TwiceError as error:
            self.stop(1, "duplicate-key", f"the key {str(error)!r} stands here twice", "remove one of the two")
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
            self.stop(line, "json-syntax", f"not valid JSON: {_said(error)}", _JSON_CURE)
        if not isinstance(entry, dict):
            cure = 'write one device: {"id": "temp-101", "location": "hall-1", "roles": ["sensor"]}'
            self.stop(1, "wrong-type", "this is not an object", cure)
        yield 1, entry


class _JSON(_List):
    """What a devices.yml says, in JSON; or only its list of devices. It is read piece by piece."""

    def entries(self) -> Iterator[tuple[int, object]]:
        with self.path.open(encoding="utf-8-sig", newline="\n") as stream:
            text = _Text(self, stream)
            match text.peek():
                case "[":
                    yield from self._devices(text)
                case "{":
                    yield from self._file(text)
                case "":
                    self.stop(1, "file-empty", "the file is empty", 'begin it with {"version": 1, "devices": [')
                case _:
                    cure = 'begin it with {"version": 1, "devices": ['
                    self.stop(text.line(), "wrong-type", "the file must be an object or a list of devices", cure)
            if text.peek():
                self.stop(text.line(), "json-syntax", "not valid JSON: something follows the end", _JSON_CURE)

    def _file(self, text: _Text) -> Iterator[tuple[int, object]]:
        seen: set[str] = set()
        begin = text.line()
        for _ in text.elements("}"):
            line, key = text.line(), text.value()
            if not isinstance(key, str):
                self.stop(line, "json-syntax", "not valid JSON: a key must be text in quotes", _JSON_CURE)
            text.expect(":")
            if key in seen:
                self.stop(line, "duplicate-key", f"the key {key!r} stands here again", "remove one of the two")
            seen.add(key)
            if key == "devices" and text.peek() == "[":
                yield from self._devices(text)
            else:
                # Wrong in words that the schema has.
                self._outside(line, key, text.value())
        for key in ("version", "devices"):
            if key not in seen:
                self._outside(begin, None, None, missing=key)

    def _outside(self, line: int, key: str | None, value: object, missing: str | None = None) -> None:
        """Compare what is not a device with the schema."""
        rest: dict[str, object] = {"version": 1, "devices": []}
        if key is not None:
            rest[key] = value
        if missing is not None:
            del rest[missing]
        self._collector.problems += check_shape("devices", _node(rest, Place(self.file, line)))

    @staticmethod
    def _devices(text: _Text) -> Iterator[tuple[int, object]]:
        for line in text.elements("]"):
            yield line, text.value()


def _said(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


class _Text:
    """A JSON file of which only a piece is in memory."""

    def __init__(self, reader: _List, stream: TextIO) -> None:
        self._reader = reader
        self._stream = stream
        self._buffer = ""
        self._at = 0
        self._ended = False
        self._lines = 1
        self._counted = 0

    def line(self, at: int | None = None) -> int:
        """Return the line of a place in the buffer; of the next character when None."""
        at = self._at if at is None else at
        if at >= self._counted:
            self._lines += self._buffer.count("\n", self._counted, at)
            self._counted = at
            return self._lines
        return self._lines - self._buffer.count("\n", at, self._counted)

    def peek(self) -> str:
        """Pass over white space, and return the next character; an empty string at the end."""
        while True:
            match = _SPACE.match(self._buffer, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._buffer) or not self._fill():
                return self._buffer[self._at : self._at + 1]

    def expect(self, character: str) -> None:
        """Pass over one character."""
        if self.peek() != character:
            message = f"not valid JSON: {character!r} must stand here, or before"
            self._reader.stop(self.line(), "json-syntax", message, _JSON_CURE)
        self._at += 1

    def elements(self, end: str) -> Iterator[int]:
        """Go through a list or an object from its bracket to its `end`: the line of each element, to be read then."""
        self._at += 1
        if self.peek() == end:
            self._at += 1
            return
        while True:
            self.peek()
            yield self.line()
            if self.peek() == end:
                self._at += 1
                return
            self.expect(",")

    def value(self) -> object:
        """Read one value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except _TwiceError as error:
                message = f"the key {str(error)!r} stands here twice"
                self._reader.stop(self.line(), "duplicate-key", message, "remove one of the two")
            except (ValueError, RecursionError) as error:
                if len(self._buffer) - self._at < _LONGEST_ENTRY and self._fill():
                    continue
                at = error.pos if isinstance(error, json.JSONDecodeError) else self._at
                self._reader.stop(self.line(at), "json-syntax", f"not valid JSON: {_said(error)}", _JSON_CURE)
            # A number goes on in the next piece, perhaps.
            if end < len(self._buffer) or not self._fill():
                self._at = end
                return value

    def _fill(self) -> bool:
        """Read on; say whether there was more. What was read before is dropped."""
        if self._ended:
            return False
        self.line()
        piece = self._stream.read(_CHUNK)
        self._ended = not piece
        self._buffer = self._buffer[self._at :] + piece
        self._at = self._counted = 0
        return bool(piece)
