# SPDX-License-Identifier: Apache-2.0
"""Pre-shared keys in TLS for the client side (RFC 4279, RFC 8446 2.2), also where Python has no word for them.

- :func:`offer`: let a TLS context offer an identity and its key.

Python knows ``SSLContext.set_psk_client_callback`` from 3.13 on, and for TLS 1.2 only. So the same function of OpenSSL
is called past Python's ``ssl`` where that can be done. The standard library is enough: the lab's devices run this too.
"""

from __future__ import annotations

import _ssl
import ctypes
import ssl
import sys
from typing import Any

LONGEST_IDENTITY = 128
"""Bytes that OpenSSL has room for (PSK_MAX_IDENTITY_LEN)."""


class UnavailableError(Exception):
    """The Python at hand cannot offer a pre-shared key; the message says why."""


def offer(context: ssl.SSLContext, identity: str, key: bytes) -> None:
    """Let a client's context offer a pre-shared key, in TLS 1.2 and 1.3.

    The cipher suites are the caller's business: OpenSSL's default for TLS 1.2 has some without forward secrecy. So is
    the server's certificate: with a pre-shared key it has none.

    :raises UnavailableError: when that cannot be done here.
    """
    name = identity.encode()
    if not 1 <= len(name) <= LONGEST_IDENTITY or b"\0" in name:
        raise UnavailableError(f"an identity has 1 to {LONGEST_IDENTITY} bytes and no NUL")
    try:
        _offer_past_python(context, name, key)
    except UnavailableError:
        if sys.version_info < (3, 13):
            raise
        context.set_psk_client_callback(lambda _hint: (identity, key))
        # Python gives each session a mark that OpenSSL misses in TLS 1.3 on one that comes of such a key.
        context.maximum_version = ssl.TLSVersion.TLSv1_2


def _offer_past_python(context: ssl.SSLContext, identity: bytes, key: bytes) -> None:
    try:
        # Symbols of libssl are found through the module that is linked with it.
        library = ctypes.CDLL(_ssl.__file__)
        set_callback: Any = library.SSL_CTX_set_psk_client_callback
        set_mark: Any = library.SSL_CTX_set_session_id_context
        get_options: Any = library.SSL_CTX_get_options
    except (AttributeError, OSError) as exc:
        raise UnavailableError(f"the OpenSSL of this Python cannot be reached: {exc}") from exc
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_uint,
    )
    # CPython's PySSLContext (Modules/_ssl.c): the object's head, then the SSL_CTX *.
    pointer = ctypes.c_void_p.from_address(id(context) + object.__basicsize__)
    get_options.argtypes, get_options.restype = [ctypes.c_void_p], ctypes.c_uint64
    if get_options(pointer) != int(context.options) & 0xFFFFFFFFFFFFFFFF:
        raise UnavailableError("the TLS contexts of this Python are not what they were")

    def hand_over(_tls: Any, _hint: Any, name_at: Any, name_room: Any, key_at: Any, key_room: Any) -> int:
        if len(identity) >= name_room or len(key) > key_room:
            return 0
        ctypes.memmove(name_at, identity + b"\0", len(identity) + 1)
        ctypes.memmove(key_at, key, len(key))
        return len(key)

    callback = prototype(hand_over)
    set_callback.argtypes, set_callback.restype = [ctypes.c_void_p, prototype], None
    set_callback(pointer, callback)
    set_mark.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint]
    set_mark(pointer, b"", 0)
    # It must live as long as the context.
    context.bednet_psk = callback  # type: ignore[attr-defined]
