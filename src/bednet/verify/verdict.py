# SPDX-License-Identifier: Apache-2.0
"""What a check saw: :class:`Verdict`, and how those of several listeners or TLS versions become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bednet.probe import Handshake, Listener, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bednet.verify.target import Target

# Characters; whatever a gateway says of itself may be very long.
_LONGEST_EVIDENCE = 1000


@dataclass(frozen=True)
class Verdict:
    """What one check saw: enough for an operator to understand it, never a secret."""

    passed: bool
    evidence: str

    def __post_init__(self) -> None:
        """Take out what a hostile gateway could do to a terminal with a reason or a topic of its own."""
        said = self.evidence if len(self.evidence) <= _LONGEST_EVIDENCE else f"{self.evidence[:_LONGEST_EVIDENCE]}..."
        object.__setattr__(
            self, "evidence", "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in said)
        )


def everywhere(listeners: Sequence[Listener], look: Callable[[Listener], Verdict]) -> Verdict:
    """Hold one check against several listeners: it passes if it passes on each."""
    verdicts = [(listener, look(listener)) for listener in listeners]
    if not verdicts:
        return Verdict(False, "no listener to look at")
    # What is the same everywhere is said once.
    evidence: dict[str, list[int]] = {}
    for listener, verdict in verdicts:
        evidence.setdefault(("" if verdict.passed else "NOT: ") + verdict.evidence, []).append(listener.port)
    text = "; ".join(f"{', '.join(map(str, ports))}: {words}" for words, ports in evidence.items())
    return Verdict(all(verdict.passed for _, verdict in verdicts), text)


def each_listener(look: Callable[[Target, Listener], Verdict]) -> Callable[[Target], Verdict]:
    """Return the check that holds another against each TLS listener of a gateway."""
    return lambda target: everywhere(target.listeners, lambda listener: look(target, listener))


def joined(verdicts: Sequence[tuple[str, Verdict]], between: str = " ") -> Verdict:
    """Put verdicts with the same evidence in one phrase.

    :param between: what stands between their labels and the evidence.
    """
    groups: dict[str, list[str]] = {}
    for label, verdict in verdicts:
        groups.setdefault(verdict.evidence, []).append(label)
    text = "; ".join(f"{', '.join(labels)}{between}{words}" for words, labels in groups.items())
    return Verdict(all(verdict.passed for _, verdict in verdicts), text)


def alert(seen: Handshake, *reasons: str) -> Verdict:
    """Pass if the server refused with one of these alerts."""
    if seen.accepted:
        return Verdict(False, f"accepted: {seen}")
    if seen.outcome is Outcome.ALERT and seen.reason in reasons:
        return Verdict(True, f"refused: {seen.reason}")
    return Verdict(False, f"{seen}, expected the alert {' or '.join(reasons)}")
