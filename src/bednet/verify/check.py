# SPDX-License-Identifier: Apache-2.0
"""What a check is: :class:`Check`, and the :data:`LAYERS` that checks belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from bednet.verify.target import Doors

if TYPE_CHECKING:
    from collections.abc import Callable

    from bednet.verify.task import Scope
    from bednet.verify.verdict import Verdict

REACHABILITY, ENCRYPTION, AUTHENTICATION = "reachability", "encryption", "authentication"
ACCESS, LIMITS = "access control", "limits"
LAYERS = (REACHABILITY, ENCRYPTION, AUTHENTICATION, ACCESS, LIMITS)

T_contra = TypeVar("T_contra", bound=Doors, contravariant=True)


@dataclass(frozen=True)
class Check(Generic[T_contra]):
    """One check.

    :param layer: encryption, authentication, access control, limits or reachability.
    :param name: a short sentence that is true when the check passes.
    :param bite: whether it is one of the few that end a deployment.
    :param session: whether it takes the identity's session, or would on a lax gateway; a gateway holds one session for
        an identity, so these run one after the other.
    :param applies: whether there is anything to check there.
    """

    layer: str
    name: str
    bite: bool
    run: Callable[[T_contra], Verdict]
    session: bool = False
    applies: Callable[[T_contra], bool] = lambda _: True


def of_scope(checks: tuple[Check[T_contra], ...], scope: Scope) -> tuple[Check[T_contra], ...]:
    """Return the checks of a list that are in a scope, in the order of a report."""
    return tuple(check for check in checks if scope == "all" or check.bite)
