# SPDX-License-Identifier: Apache-2.0
"""Which devices a rule is about: its ``when``, an expression in CEL over ``device``.

- :class:`When`: a checked expression, asked for one device at a time.
- :class:`WhenError`: why an expression is no good, or has no answer for a device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bednet.errors import BednetError

if TYPE_CHECKING:
    from bednet.devices import Device
    from bednet.errors import Place


class WhenError(BednetError):
    """An expression cannot be used, or has no answer for a device.

    :ivar cure: one sentence that says what to write instead.
    """

    def __init__(self, code: str, message: str, cure: str) -> None:
        super().__init__(message)
        self.code = code
        self.cure = cure


class When:
    """A ``when``.

    :ivar reads: the keys of a device that its answer can depend on; None when that may be any.
    """

    def __init__(self, text: str, place: Place) -> None:
        self.text = text
        self.place = place
        self.reads: frozenset[str] | None = None

    def matches(self, device: Device) -> bool:
        """Say whether a device is meant.

        :raises WhenError: when the expression has no answer for it.
        """
        raise WhenError("when-syntax", f"{self.text!r} cannot be read yet for {device.id}", "")
