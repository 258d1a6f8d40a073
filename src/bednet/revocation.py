# SPDX-License-Identifier: Apache-2.0
"""Revoking a device in its site's files, and taking that back: ``bednet revoke`` and ``bednet reinstate``.

- :func:`revoke`, :func:`reinstate`: change ``revoked:`` of one device in devices.yml, durably, and nothing else.
  Reinstating leaves a mark, ``reinstated:`` with the time: a gateway that knows a device as revoked lets it in again
  only for a later mark than it has seen, so that no older copy of the list brings it back.
- :func:`revoke_text`, :func:`reinstate_text`: the same with a text.
- :func:`add_parser`: adds the two commands.

The text is edited in place, so that comments, order and form stay as their writer left them. Before a file is written,
old and new text are read as YAML and compared: but for these values they must say the same. Nothing else of the site
is looked at: a mistake elsewhere must not hold a revocation up.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bednet import yamlfile
from bednet.devices_import import load_devices
from bednet.errors import BednetError, SiteError
from bednet.moment import instant_text, parse_instant

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping

    from bednet.errors import Problem

DEVICES = "devices.yml"
REASONS = (
    "keyCompromise",
    "cessationOfOperation",
    "superseded",
    "affiliationChanged",
    "privilegeWithdrawn",
    "unspecified",
)
"""Why a device can be revoked, in the words of RFC 5280, 5.3.1."""
COMPROMISED = "keyCompromise"
UNCHANGED = "Nothing was changed."
"""The end of what the commands say when there was nothing to do."""

_NULL = {"", "~", "null"}
_BOM = "\ufeff"
# Both emit the same events; libyaml's are some ten times faster.
_Loader: type[Any] = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


class RevocationError(BednetError):
    """A device cannot be revoked or reinstated so; the message says why and what to do."""

    code = "revocation"


class NotListedError(RevocationError):
    """devices.yml has no such device."""


@dataclass(frozen=True)
class _Field:
    """One key of a device with its value, as places in the text."""

    start: int
    value_start: int
    value_end: int
    value: str | None  # None for a list or a mapping


@dataclass
class _Entry:
    """One device as it stands in the text.

    :ivar column: how far the keys of a block are indented.
    """

    number: int
    flow: bool
    line: int
    column: int = 0
    fields: dict[str, _Field] = field(default_factory=dict)

    @property
    def revoked(self) -> str | None:
        """The reason that stands there; None while the device is in service."""
        return self._stated("revoked")

    @property
    def reinstated(self) -> str | None:
        """The mark that stands there."""
        return self._stated("reinstated")

    def _stated(self, name: str) -> str | None:
        found = self.fields.get(name)
        return None if found is None or found.value in _NULL else found.value


@dataclass(frozen=True)
class Edit:
    """What became of a devices.yml.

    :ivar text: the new text.
    :ivar changed: whether it differs from the old one.
    :ivar line: the device's line in the old text.
    :ivar before: the reason that stood there; None for a device in service.
    :ivar reinstated: the mark of the last reinstatement that stood there, as it is written; None for none.
    :ivar file: which of the site's lists the device stands in.
    """

    text: str
    changed: bool
    line: int
    before: str | None
    reinstated: str | None = None
    file: str = DEVICES


# --- Where a device stands ------------------------------------------------------------------------------------------


def _mark(mark: Any) -> yaml.Mark:
    """Return a place in the text: in what is read from text it is never missing, whatever its type says."""
    found: yaml.Mark = mark
    return found


def _entries(text: str) -> Iterator[_Entry]:
    """Go through the devices of a devices.yml.

    :raises yaml.YAMLError: when it is no YAML.
    """
    events = iter(yaml.parse(text, Loader=_Loader))

    def skip(event: yaml.Event) -> int:
        """Read a value to its end; return where that is."""
        depth = 0
        while True:
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if not depth:
                return _mark(event.end_mark).index
            event = next(events)

    for event in events:
        if isinstance(event, yaml.MappingStartEvent):
            break
    else:
        return
    while not isinstance(key := next(events), yaml.MappingEndEvent):
        value = next(events)
        if getattr(key, "value", None) != "devices" or not isinstance(value, yaml.SequenceStartEvent):
            skip(value)
            continue
        number = 0
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            if isinstance(item, yaml.MappingStartEvent):
                yield _entry(number, item, events, skip)
            else:
                skip(item)
            number += 1


def _entry(
    number: int, start: yaml.MappingStartEvent, events: Iterator[yaml.Event], skip: Callable[[yaml.Event], int]
) -> _Entry:
    entry = _Entry(number, bool(start.flow_style), _mark(start.start_mark).line + 1)
    while not isinstance(key := next(events), yaml.MappingEndEvent):
        value = next(events)
        name = key.value if isinstance(key, yaml.ScalarEvent) else ""
        text = value.value if isinstance(value, yaml.ScalarEvent) else None
        if name in entry.fields:
            where = f"{DEVICES}:{_mark(key.start_mark).line + 1}"
            raise RevocationError(f"{where}: the key {name!r} stands here again. Cure: remove one of the two")
        if not entry.fields:
            entry.column = _mark(key.start_mark).column
        entry.fields[name] = _Field(_mark(key.start_mark).index, _mark(value.start_mark).index, skip(value), text)
    return entry


def _find(text: str, device: str) -> _Entry:
    found = None
    for entry in _entries(text):
        identity = entry.fields.get("id")
        if identity is None or identity.value != device:
            continue
        if found is not None:
            raise RevocationError(
                f"{DEVICES}:{entry.line}: device {device!r} is listed again; it stands in line {found.line} already. "
                "Cure: remove one of the two"
            )
        found = entry
    if found is None:
        raise NotListedError(f"device {device!r} is not listed in {DEVICES}. Cure: look how its id is written there")
    return found


# --- Changing the text ----------------------------------------------------------------------------------------------


def revoke_text(text: str, device: str, reason: str) -> Edit:
    """Return a devices.yml in which a device is revoked.

    :param reason: in the words of RFC 5280, 5.3.1.
    :raises RevocationError: when the reason is none, the device is not listed, or is revoked for another reason: only
        a key compromise may be learnt of later.
    :raises yaml.YAMLError: when the text is no YAML.
    """
    if reason not in REASONS:
        raise RevocationError(f"{reason!r} is no reason for a revocation. Cure: one of {', '.join(REASONS)}")
    entry = _find(text, device)
    before = entry.revoked
    if before == reason:
        return Edit(text, False, entry.line, before, entry.reinstated)
    if before is not None and reason != COMPROMISED:
        raise RevocationError(
            f"{DEVICES}:{entry.line}: {device} is revoked already, for {before}. Cure: leave it at that; only "
            f"{COMPROMISED} can still be said of it"
        )
    return _proven(text, _with(text, entry, "revoked", reason), entry, {"revoked": reason})


def _with(text: str, entry: _Entry, name: str, value: str) -> str:
    """Return the text with another value for a key of a device, or with the key behind its id."""
    there = entry.fields.get(name)
    identity = entry.fields["id"]
    if there is not None:
        gap = " " if text[there.value_start - 1 : there.value_start] == ":" else ""
        return text[: there.value_start] + gap + value + text[there.value_end :]
    if entry.flow:
        return f"{text[: identity.value_end]}, {name}: {value}{text[identity.value_end :]}"
    line_end = text.find("\n", identity.value_end)
    line_end = len(text) if line_end < 0 else line_end
    newline = "\r\n" if text[line_end - 1 : line_end] == "\r" else "\n"
    before_newline = line_end - len(newline) + 1
    return f"{text[:before_newline]}{newline}{' ' * entry.column}{name}: {value}{text[before_newline:]}"


def reinstate_text(text: str, device: str, now: dt.datetime, *, again: bool = False) -> Edit:
    """Return a devices.yml in which a device is in service, with a mark that is later than any before.

    :param again: write a new mark even when the list does not say that the device is revoked: the gateways may.
    :raises RevocationError: when the device is not listed, or its key was compromised.
    :raises yaml.YAMLError: when the text is no YAML.
    """
    entry = _find(text, device)
    if entry.revoked is None and not again:
        return Edit(text, False, entry.line, None, entry.reinstated)
    if entry.revoked == COMPROMISED:
        raise RevocationError(
            f"{DEVICES}:{entry.line}: {device} was revoked for {COMPROMISED}: whoever has its key would come back too. "
            "Cure: leave it revoked; or, with the device in good hands again, write "
            f"`reinstated: {_mark_text(now, None)}` in place of `revoked` by hand and run playbooks/site.yml, which "
            "gives it new keys"
        )
    mark = _mark_text(now, entry.reinstated)
    revoked = entry.fields.get("revoked")
    if revoked is None:
        new = _with(text, entry, "reinstated", mark)
    elif "reinstated" not in entry.fields:
        new = f"{text[: revoked.start]}reinstated: {mark}{text[revoked.value_end :]}"
    else:
        try:
            new = _without(text, entry, "revoked")
            new = _with(new, _find(new, device), "reinstated", mark)
        except (yaml.YAMLError, RevocationError):
            new = ""  # refused, as it proves nothing
    return _proven(text, new, entry, {"reinstated": mark.strip('"')})


def _mark_text(now: dt.datetime, before: str | None) -> str:
    """Return a mark in quotes, later than the one before even if that is ahead of the clock."""
    try:
        after = parse_instant(before) + dt.timedelta(seconds=1) if before is not None else now
    except ValueError:
        after = now
    return f'"{instant_text(max(now, after).replace(microsecond=0))}"'


def _without(text: str, entry: _Entry, name: str) -> str:
    """Return the text without a key of a device."""
    there = entry.fields[name]
    others = sorted(entry.fields.values(), key=lambda one: one.start)
    place = others.index(there)
    following = others[place + 1] if place + 1 < len(others) else None
    line_start = text.rfind("\n", 0, there.start) + 1
    line_end = text.find("\n", there.value_end)
    line_end = len(text) if line_end < 0 else line_end + 1
    rest = text[there.value_end : line_end]
    if entry.flow and place:
        return text[: others[place - 1].value_end] + text[there.value_end :]
    if entry.flow or text[line_start : there.start].strip():
        # The first of the device's keys: the next one takes its place.
        return text[: there.start] + text[following.start if following else there.value_end :]
    if rest.strip():
        # A comment in the same line stays.
        return text[: there.start] + rest.lstrip(" \t") + text[line_end:]
    return text[:line_start] + text[line_end:]


def _proven(text: str, new: str, entry: _Entry, stated: Mapping[str, str]) -> Edit:
    """Make sure that the new text says what it should, and else the same as the old one."""
    wanted = yaml.load(text, Loader=_Loader)  # noqa: S506 - a BaseLoader makes nothing but text
    device = wanted["devices"][entry.number]
    device.pop("revoked", None)
    device.update(stated)
    try:
        said = yaml.load(new, Loader=_Loader)  # noqa: S506 - likewise
    except yaml.YAMLError:
        said = None
    comments = [line.partition("#")[2] for line in text.splitlines() if "#" in line]
    if said != wanted or comments != [line.partition("#")[2] for line in new.splitlines() if "#" in line]:
        ((name, value),) = stated.items()
        what = f"write `revoked: {value}` into its entry"
        if name != "revoked":
            what = f'write `reinstated: "{value}"` in place of `revoked` into its entry'
        raise RevocationError(
            f"{DEVICES}:{entry.line}: this entry is written in a form that is not changed here. Cure: {what} by hand, "
            "and run this again"
        )
    return Edit(new, True, entry.line, entry.revoked, entry.reinstated)


# --- Files ----------------------------------------------------------------------------------------------------------


def revoke(site: Path, device: str, reason: str, *, check: bool = False) -> Edit:
    """Revoke a device in the devices.yml of a site; it is on the disk when this returns.

    :param check: change nothing.
    :raises RevocationError: see :func:`revoke_text`; also when the file cannot be written.
    :raises SiteError: when devices.yml is no YAML.
    """
    if reason not in REASONS:
        revoke_text("", device, reason)
    try:
        return _edit(site, lambda text: revoke_text(text, device, reason), check=check)
    except NotListedError as exc:
        return _elsewhere(site, device, reason, exc)


def reinstate(site: Path, device: str, now: dt.datetime, *, again: bool = False, check: bool = False) -> Edit:
    """Take a revocation back in the devices.yml of a site; it is on the disk when this returns.

    :param again: see :func:`reinstate_text`.
    :param check: change nothing.
    :raises RevocationError: see :func:`reinstate_text`; also when the file cannot be written.
    :raises SiteError: when devices.yml is no YAML.
    """
    try:
        return _edit(site, lambda text: reinstate_text(text, device, now, again=again), check=check)
    except NotListedError as exc:
        return _elsewhere(site, device, None, exc, mark=_mark_text(now, None), again=again)


def _elsewhere(
    site: Path, device: str, reason: str | None, not_listed: NotListedError, *, mark: str = "", again: bool = False
) -> Edit:
    """Look in the lists that other programs write: they are not changed here, but may say it already."""
    problems: list[Problem] = []
    found = (load_devices(site, problems) or {}).get(device)
    if found is None:
        if problems and any((site / name).exists() for name in ("devices.csv", "devices.json", "devices.jsonl")):
            raise SiteError(problems) from not_listed
        raise not_listed
    if found.revoked == COMPROMISED and reason != COMPROMISED:
        raise RevocationError(
            f"{found.place}: {device} is revoked for {COMPROMISED}, and that cannot be taken back. "
            "Cure: leave it revoked"
        ) from not_listed
    if found.revoked != reason or again:
        what = f"write {reason!r} as its `revoked`"
        if reason is None:
            what = f"empty its `revoked`, write {mark} as its `reinstated`"
        raise RevocationError(
            f"{found.place}: {device} stands in a list that another program writes, and it is not changed here. "
            f"Cure: {what} where that list comes from, and run this again"
        ) from not_listed
    stamp = None if found.reinstated is None else instant_text(found.reinstated)
    return Edit("", False, found.place.line, found.revoked, stamp, Path(found.place.file).name)


def _edit(site: Path, change: Callable[[str], Edit], *, check: bool) -> Edit:
    # A link stays one: what it leads to is written.
    path = (site / DEVICES).resolve()
    try:
        with _alone(path.parent):
            raw = path.read_bytes() if path.exists() else b""
            text = raw.decode("utf-8")
            mark = _BOM if text.startswith(_BOM) else ""
            edit = change(text.removeprefix(_BOM))
            if edit.changed and not check:
                _write(path, (mark + edit.text).encode())
            return edit
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        _, problems = yamlfile.load(path)
        if problems:
            raise SiteError(problems) from exc
        raise RevocationError(f"{path} cannot be read: {exc}. Cure: see `bednet check {site}`") from exc
    except OSError as exc:
        raise RevocationError(
            f"{exc.filename or path}: {exc.strerror}. Cure: name the site's folder, and see that you may write there"
        ) from exc


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let two who change the same site take turns."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    """Put a file in place of another in one step, with the same mode and owner, and wait for the disk."""
    old = path.stat()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, old.st_mode & 0o7777)
            if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(descriptor, old.st_uid, old.st_gid)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- Commands -------------------------------------------------------------------------------------------------------


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands of this module; each sets ``run``, a function of the arguments that returns the exit code."""
    more = "Only the file is changed; playbooks/{}.yml does this and tells the gateways and the CA."
    one = subparsers.add_parser(
        "revoke", help="write into a site's devices.yml that a device is revoked", description=more.format("revoke")
    )
    one.set_defaults(run=_command_revoke)
    two = subparsers.add_parser(
        "reinstate",
        help="take a device's revocation out of a site's devices.yml",
        description=more.format("reinstate"),
    )
    two.set_defaults(run=_command_reinstate)
    for parser in (one, two):
        parser.add_argument("site", type=Path, metavar="SITE", help="the site's folder, such as inventories/lab")
        parser.add_argument("device", metavar="ID", help="the device's id")
        parser.add_argument("--check", action="store_true", help="change nothing, and say what would be changed")
    two.add_argument(
        "--again",
        action="store_true",
        help="mark it as reinstated now, though the list does not say that it is revoked: a gateway may say so",
    )
    one.add_argument("reason", metavar="REASON", help=f"one of {', '.join(REASONS)}")


def _command_revoke(arguments: argparse.Namespace) -> int:
    edit = revoke(arguments.site, arguments.device, arguments.reason, check=arguments.check)
    before = f" (reinstated before, at {edit.reinstated})" if edit.reinstated else ""
    _say(arguments, edit, f"is revoked for {arguments.reason}{before}")
    return 0


def _command_reinstate(arguments: argparse.Namespace) -> int:
    now = dt.datetime.now(dt.UTC)
    edit = reinstate(arguments.site, arguments.device, now, again=arguments.again, check=arguments.check)
    was = f" (it was revoked for {edit.before})" if edit.before else ""
    _say(arguments, edit, f"is in service{was}")
    return 0


def _say(arguments: argparse.Namespace, edit: Edit, what: str) -> None:
    how = "" if edit.changed else f" {UNCHANGED}"
    would = "would say that " if edit.changed and arguments.check else ""
    sys.stdout.write(f"{arguments.site / edit.file}:{edit.line}: {would}{arguments.device} {what}.{how}\n")
