# SPDX-License-Identifier: Apache-2.0
"""Which devices a rule is about: its ``when``, an expression in CEL over ``device``.

- :class:`When`: a checked expression, asked for one device at a time.
- :class:`WhenError`: why an expression is no good, or has no answer for a device.

CEL is not Turing-complete, and the library bounds nesting (32 levels) and iterations (10,000) by itself; the bounds
here keep what is left of a runaway expression short.
"""

from __future__ import annotations

import functools
import re
import time
from typing import TYPE_CHECKING, TypeAlias

from cel_expr_python import cel

from bednet.errors import BednetError
from bednet.shape import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from bednet.devices import Device
    from bednet.errors import Place

MAX_CHARACTERS = 4096
"""The longest expression."""

MAX_SECONDS = 60.0
"""How long one expression may take for all devices of a site together."""

DEVICE_KEYS = ("id", "location", "type", "tags", "roles", "attributes")
"""What ``device`` has besides the attributes themselves."""

_Fact: TypeAlias = "str | int | float | bool | list[str] | dict[str, str | int | float | bool | None] | None"

_ERROR = re.compile(r"ERROR: <input>:(-?[0-9]+):(-?[0-9]+): (.*)")
_STATUS = re.compile(r"^[A-Z_]+: | \[[A-Z_]+\]$")
_MISSING = re.compile(r'Key not found in map : "(.*)"')
_FUNCTIONS = ("size", "matches", "startsWith", "endsWith", "contains", "exists", "all", "exists_one", "has", "int")
# Each `device` of an expression, wherever it stands, strings and comments included: to read more than is needed costs
# a little time, to read less would give one device another's answer.
_MENTION = re.compile(r"\bdevice\b(?:\.([A-Za-z_][A-Za-z0-9_]*))?")


class WhenError(BednetError):
    """An expression cannot be used, or has no answer for a device.

    :ivar cure: one sentence that says what to write instead.
    :ivar missing: the key of the device that it lacks, when that is the reason.
    """

    def __init__(self, code: str, message: str, cure: str, missing: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.cure = cure
        self.missing = missing


@functools.cache
def _environment() -> cel.Env:
    return cel.NewEnv(variables={"device": cel.Type.Map(cel.Type.STRING, cel.Type.DYN)})


def _reads(text: str) -> frozenset[str] | None:
    names = [match[1] for match in _MENTION.finditer(text)]
    return None if None in names else frozenset(names)


def _fact(device: Device, name: str) -> _Fact:
    match name:
        case "tags" | "roles":
            return list(getattr(device, name))
        case "type":
            return device.type or ""
        case "attributes":
            return dict(device.attributes)
        case _:
            return device.value(name)


def _syntax_error(text: str, error: str) -> WhenError:
    """Turn what the library says about an expression into one sentence with a cure."""
    found = _ERROR.search(error)
    if found is None or int(found[1]) < 1:
        reason = _STATUS.sub("", found[3] if found else error.split("\n", 1)[0]).rstrip(".")
        cure = "split the rule in two, or use lists and `in` in place of many conditions"
        return WhenError("when-limits", f"'when' is too deep or too long: {reason}", cure)
    line, column, reason = int(found[1]), int(found[2]), _STATUS.sub("", found[3])
    where = f"character {column}" if "\n" not in text.strip("\n") else f"line {line}, character {column}"
    cure = "write a condition such as \"'FactoryFloor' in device.tags && device.location == 'hall-1'\""
    if (name := re.match(r"undeclared reference to '([^']*)'", reason)) is not None:
        first = name[1].split(".")[0]
        near = did_you_mean(first, ("device", *_FUNCTIONS))
        cure = f"{near}A condition knows nothing but `device` and CEL's own functions; text stands in quotes"
        if first in DEVICE_KEYS:
            cure = f"write device.{first}"
        reason = f"'{name[1]}' is not known here"
    elif "token recognition error at: '= '" in reason:
        cure = "compare with =="
    elif "token recognition error at: ''" in reason or "token recognition error at: '\"" in reason:
        cure = "close the quote"
    elif (types := re.match(r"found no matching overload for '(.*)' applied to '\((.*)\)'", reason)) is not None:
        operator = types[1].strip("_").replace("_", " ")
        reason = f"{operator} is not made for {types[2].replace(', ', ' and ').replace('dyn', 'a value')}"
        cure = "let both sides be of one kind: text in quotes, numbers without"
    reason = (
        re.sub(r" expecting \{.*\}", "", reason)
        .removeprefix("Syntax error: ")
        .replace("mismatched input '<EOF>'", "it ends too early")
    )
    return WhenError("when-syntax", f"'when' is not a condition in CEL, at {where}: {reason}", cure)


class When:
    """A ``when``.

    :ivar reads: the keys of a device that its answer can depend on; None when that may be any.
    """

    def __init__(self, text: str, place: Place, clock: Callable[[], float] = time.monotonic) -> None:
        """Check an expression.

        :param clock: counts seconds.
        :raises WhenError: when it is no condition in CEL, or too long.
        """
        self.text = text
        self.place = place
        self.reads = _reads(text)
        self._clock = clock
        self._spent = 0.0
        if len(text) > MAX_CHARACTERS:
            message = f"'when' has {len(text)} characters, and {MAX_CHARACTERS} are the most"
            raise WhenError("when-limits", message, "split the rule in two, or give the devices a tag for it")
        try:
            self._program = _environment().compile(text)
        except RuntimeError as error:
            raise _syntax_error(text, str(error)) from error
        kind = self._program.return_type()
        if kind not in (cel.Type.BOOL, cel.Type.DYN):
            message = f"'when' is {kind.name().lower()}, neither true nor false"
            raise WhenError("when-type", message, "write a condition, such as \"device.location == 'hall-1'\"")

    def matches(self, device: Device) -> bool:
        """Say whether a device is meant.

        :raises WhenError: when the expression has no answer for it, or took too long for this and earlier ones.
        """
        names = self.reads
        if names is None:
            names = frozenset((*DEVICE_KEYS, *device.attributes))
        facts = {name: _fact(device, name) for name in names if name in DEVICE_KEYS or name in device.attributes}
        began = self._clock()
        try:
            value = self._program.eval(data={"device": facts})
        except RuntimeError as error:
            reason = _STATUS.sub("", str(error).split("\n", 1)[0])
            cure = "make it simpler, or give the devices a tag for it"
            raise WhenError("when-limits", f"'when' is too much work: {reason}", cure) from error
        finally:
            self._spent += self._clock() - began
        if self._spent > MAX_SECONDS:
            message = f"'when' took more than {MAX_SECONDS:.0f} seconds"
            raise WhenError("when-limits", message, "make it simpler, or give the devices a tag for it")
        kind = value.type()
        if kind == cel.Type.BOOL:
            return bool(value.value())
        if kind != cel.Type.ERROR:
            message = f"'when' is {kind.name().lower()}, neither true nor false"
            raise WhenError("when-type", message, "compare it with something, as in device.line == 1")
        reason = _STATUS.sub("", str(value.plain_value()))
        if (missing := _MISSING.search(reason)) is not None:
            name = missing[1]
            cure = f"say what holds without it, as in has(device.{name}) && ..., or add '{name}' to the device"
            raise WhenError("when-failed", f"'when' needs '{name}', which is missing", cure, name)
        cure = "let the condition ask first what the device has, as in has(device.line) && device.line > 1"
        raise WhenError("when-failed", f"'when' has no answer: {reason[:1].lower()}{reason[1:]}", cure)
