# SPDX-License-Identifier: Apache-2.0
"""The plugin's decision without a broker: :class:`Judge` asks the C code (src/plugin/tests/judge.c) about a store."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

from tests.plugin.gateway import build

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

PUBLISH, SUBSCRIBE, DELIVER = 1, 2, 3
# enum reason of bednet.h, in its order
REASONS = (
    "allowed",
    "unknown-device",
    "revoked",
    "certificate-revoked",
    "certificate-time",
    "method",
    "client-id",
    "username",
    "password",
    "throttled",
    "until",
    "not-allowed",
    "denied",
    "partly",
    "store",
    "internal",
)


@functools.cache
def library() -> ctypes.CDLL:
    """Return the shared library, made from the checkout's sources."""
    loaded = ctypes.CDLL(str(build("libbednet_judge.so")))
    loaded.judge_open.restype = ctypes.c_void_p
    loaded.judge_intersection.restype = ctypes.c_size_t
    loaded.judge_escape.restype = ctypes.c_size_t
    return loaded


class Judge:
    """Decides from a store, as long as the context lasts."""

    def __init__(self, folder: Path) -> None:
        why = ctypes.create_string_buffer(512)
        self._store = ctypes.c_void_p(library().judge_open(str(folder).encode(), why, ctypes.c_size_t(512)))
        if not self._store:
            raise ValueError(why.value.decode())

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        library().judge_close(self._store)

    def decide(
        self, device: str, access: int, topic: str, at: int | None = None, address: str | None = None
    ) -> tuple[str, str]:
        """Return the reason ("allowed" when it is) and the id of the rule that decides, or "".

        :param at: Unix seconds.
        """
        rule = ctypes.create_string_buffer(256)
        raw = topic.encode()
        reason = library().judge_decide(
            self._store,
            device.encode(),
            access,
            raw,
            ctypes.c_size_t(len(raw)),
            at is not None,
            ctypes.c_int64(at or 0),
            address.encode() if address is not None else None,
            rule,
        )
        return REASONS[reason], rule.value.decode()


def covers(ours: str, theirs: str) -> bool:
    one, other = ours.encode(), theirs.encode()
    return bool(library().judge_covers(one, ctypes.c_size_t(len(one)), other, ctypes.c_size_t(len(other))))


def filter_ok(text: str) -> bool:
    raw = text.encode()
    return bool(library().judge_filter_ok(raw, ctypes.c_size_t(len(raw))))


def intersection(one: str, other: str) -> str | None:
    left, right = one.encode(), other.encode()
    out = ctypes.create_string_buffer(len(left) + len(right) + 2)
    size = library().judge_intersection(left, ctypes.c_size_t(len(left)), right, ctypes.c_size_t(len(right)), out)
    return out.raw[:size].decode() if size else None


def escape(raw: bytes, room: int) -> str:
    out = ctypes.create_string_buffer(room + 1)
    size = library().judge_escape(raw, ctypes.c_size_t(len(raw)), out, ctypes.c_size_t(room))
    assert size <= room
    return out.raw[:size].decode("ascii")
