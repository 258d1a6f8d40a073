# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, and how it is said.

- :class:`BednetError`: base of every exception that this package raises on purpose.
- :class:`TopicError`: a string that is no topic name or topic filter.
- :class:`SiteError`: a site whose files cannot be used, with all their problems.
- :class:`Place` and :class:`Problem`: what is wrong, in which line of which file, and how to cure it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class BednetError(Exception):
    """Something that a caller may tell the user as it stands.

    :ivar code: short and stable; the tables in docs/ are keyed by it.
    """

    code = "bednet"


class TopicError(BednetError):
    """A string is not a valid MQTT topic name or topic filter (MQTT 5, 4.7).

    :ivar cure: one sentence that says what to write instead.
    """

    def __init__(self, code: str, message: str, cure: str) -> None:
        super().__init__(message)
        self.code = code
        self.cure = cure


@dataclass(frozen=True, order=True, slots=True)
class Place:
    """A line of a file; lines count from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong (or, as a warning, odd) in a file of a site.

    :ivar code: short and stable, see the table in docs/policy.md.
    :ivar message: a sentence without its full stop.
    :ivar cure: what to do about it, a sentence without its full stop.
    """

    place: Place
    code: str
    message: str
    cure: str
    warning: bool = False

    def __str__(self) -> str:
        kind = "warning: " if self.warning else ""
        return f"{self.place}: {kind}{self.message}. Cure: {self.cure}. [{self.code}]"


class SiteError(BednetError):
    """The files of a site have problems; nothing may be deployed from them.

    :ivar problems: all of them, in the order of the files' lines; never empty, no warnings.
    """

    code = "site"

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: problem.place))
        super().__init__("\n".join(str(problem) for problem in self.problems))
