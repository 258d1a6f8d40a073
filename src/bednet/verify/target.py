# SPDX-License-Identifier: Apache-2.0
"""What a check is given: a place, and everything that it takes to knock on its doors.

- :class:`Target`: a gateway. :class:`ServiceTarget`: a host of the token service.
- :class:`Doors`: what the two have in common, for checks that are held against both.
- :class:`Purse`: the probe's tokens.
"""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from bednet import probe
from bednet.probe import Credentials, Listener, Reply, Session
from bednet.site import PROBE_OWN, PROBE_READ_ONLY, PROBE_WRITE_ONLY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bednet.verify.forgeries import Forgeries
    from bednet.verify.task import Gateway, Identity, Service

OK = 200


class Place(Protocol):
    """What a gateway and a host of the token service have in common."""

    @property
    def name(self) -> str:
        """By which the report goes."""

    @property
    def address(self) -> str:
        """Where the probe connects to."""

    @property
    def server_name(self) -> str:
        """The name that its certificate carries."""

    @property
    def tls_versions(self) -> tuple[str, ...]:
        """Those that must be accepted."""


class Doors(Protocol):
    """The TLS listeners of a place, and what opens them."""

    @property
    def place(self) -> Place:
        """Whose they are."""

    @property
    def listeners(self) -> list[Listener]:
        """Every TLS listener."""

    @property
    def with_certificate(self) -> list[Listener]:
        """Those that show a certificate."""

    @property
    def has_address(self) -> bool:
        """Whether the certificate must carry the address, too."""

    def credentials(self, listener: Listener) -> Credentials:
        """Return what completes a handshake there."""


@dataclass(frozen=True)
class Target:
    """A gateway, and everything a check needs to knock on its doors."""

    gateway: Gateway
    identity: Identity
    canary: Credentials
    forgeries: Forgeries
    purse: Purse | None = None

    @property
    def place(self) -> Place:
        """The gateway."""
        return self.gateway

    @property
    def has_address(self) -> bool:
        """A gateway's certificate carries its address: devices need no name service."""
        return True

    @property
    def tokens(self) -> Purse | None:
        """Tokens of the probe, where the gateway takes any."""
        return self.purse if self.gateway.access_control == "plugin" else None

    @property
    def elsewhere(self) -> str | None:
        """For whom a token may be asked that is not for this gateway; None where there is nobody else."""
        own = f"mqtts://{self.gateway.server_name}"
        audiences = self.tokens.services[0].service.audiences if self.tokens else ()
        return next((audience for audience in audiences if audience != own), None)

    def listener(self, port: int, *, websockets: bool = False) -> Listener:
        """Return a TLS listener whose certificate is checked against the site's CA."""
        return Listener(self.gateway.address, port, self.identity.ca, self.gateway.server_name, websockets=websockets)

    @property
    def mtls(self) -> Listener:
        """The listener for certificates."""
        return self.listener(self.gateway.mtls_port)

    @property
    def password_listeners(self) -> list[Listener]:
        """The listeners for user names and passwords."""
        found = []
        if self.gateway.password_port is not None:
            found.append(self.listener(self.gateway.password_port))
        if self.gateway.websockets_port is not None:
            found.append(self.listener(self.gateway.websockets_port, websockets=True))
        return found

    @property
    def psk_listeners(self) -> list[Listener]:
        """The listener for pre-shared keys, if there is one; it has no certificate to check."""
        if self.gateway.psk_port is None:
            return []
        return [Listener(self.gateway.address, self.gateway.psk_port, server_name=self.gateway.server_name)]

    @property
    def with_certificate(self) -> list[Listener]:
        """The listeners that show a certificate of the gateway."""
        return [self.mtls, *self.password_listeners]

    @property
    def listeners(self) -> list[Listener]:
        """Every TLS listener."""
        return [*self.with_certificate, *self.psk_listeners]

    @property
    def certificate(self) -> Credentials:
        """The probe's certificate."""
        return Credentials(self.identity.certificate, self.identity.key)

    @property
    def password(self) -> Credentials:
        """The probe's password."""
        return Credentials(username=self.identity.id, password=self.identity.password)

    def credentials(self, listener: Listener) -> Credentials:
        """Return what this listener lets the probe in with."""
        if listener.port == self.gateway.psk_port:
            return self.psk
        return self.certificate if listener.port == self.gateway.mtls_port else self.password

    @property
    def psk(self) -> Credentials:
        """The probe's pre-shared key."""
        return Credentials(psk_identity=self.identity.id, psk=self.identity.psk)

    def binds_client_ids(self, listener: Listener) -> bool:
        """Whether another client id than the identity's is refused; elsewhere it is replaced."""
        return self.gateway.access_control == "plugin" and listener.port != self.gateway.psk_port

    def own(self) -> str:
        """Return a topic that the probe may use and nobody has used yet."""
        return f"{PROBE_OWN}/{secrets.token_hex(6)}"

    def unwritable(self) -> str:
        """Return a topic that the probe may read and not publish, and nobody has used yet."""
        return f"{PROBE_READ_ONLY}/{secrets.token_hex(6)}"

    def unreadable(self) -> str:
        """Return a topic that the probe may publish and not read, and nobody has used yet."""
        return f"{PROBE_WRITE_ONLY}/{secrets.token_hex(6)}"

    def watch(self, session: Session) -> None:
        """Subscribe everything through which a forbidden message could reach the probe, and the fence's topic."""
        session.subscribe("#", f"{PROBE_READ_ONLY}/#", f"{PROBE_OWN}/#")


@dataclass(frozen=True)
class ServiceTarget:
    """A host of the token service, and everything a check needs to knock on its door."""

    service: Service
    identity: Identity
    forgeries: Forgeries
    purse: Purse

    @property
    def place(self) -> Place:
        """The host."""
        return self.service

    @property
    def listener(self) -> Listener:
        """Its one listener."""
        return Listener(self.service.address, self.service.port, self.identity.ca, self.service.server_name)

    @property
    def listeners(self) -> list[Listener]:
        """Its one listener."""
        return [self.listener]

    @property
    def with_certificate(self) -> list[Listener]:
        """Its one listener."""
        return [self.listener]

    @property
    def has_address(self) -> bool:
        """Its certificate carries the name that all of its hosts have."""
        return False

    @property
    def certificate(self) -> Credentials:
        """The probe's certificate."""
        return Credentials(self.identity.certificate, self.identity.key)

    def credentials(self, _: Listener) -> Credentials:
        """Return nothing: whoever has no certificate may ask as well."""
        return probe.NOBODY

    def get(self, path: str) -> Reply:
        """Get a document."""
        return probe.request(self.listener, "GET", path)

    def ask(
        self,
        credentials: Credentials = probe.NOBODY,
        path: str = "/token",
        *,
        headers: Sequence[tuple[str, str]] = (),
        **form: str,
    ) -> Reply:
        """Ask as OAuth 2.0 does (RFC 6749, 4.4.2); nothing else is in the form than what is given."""
        return probe.request(self.listener, "POST", path, credentials=credentials, form=form, headers=headers)

    def ask_as_probe(
        self, credentials: Credentials = probe.NOBODY, *, headers: Sequence[tuple[str, str]] = (), **more: str
    ) -> Reply:
        """Ask for a token in the probe's name."""
        return self.ask(
            credentials, headers=headers, grant_type="client_credentials", client_id=self.identity.id, **more
        )


class NoTokenError(probe.ProbeError):
    """The token service gave none, so nothing can be learnt with one."""


class Purse:
    """Tokens of the probe, each asked for when it is wanted first; they live longer than any run.

    :ivar services: where they come from.
    """

    def __init__(self) -> None:
        self.services: list[ServiceTarget] = []
        self._held: dict[tuple[str, str | None], Reply] = {}
        self._guard = threading.Lock()

    def reply(self, target: ServiceTarget, audience: str | None = None) -> Reply:
        """Return what this host of the token service answers to the probe with its certificate.

        :param audience: ask for a token for this one alone (RFC 8707).
        """
        key = target.service.name, audience
        with self._guard:
            if key not in self._held:
                more: dict[str, str] = {} if audience is None else {"resource": audience}
                self._held[key] = target.ask_as_probe(target.certificate, headers=(), **more)
            return self._held[key]

    def token(self, target: ServiceTarget | None = None, audience: str | None = None) -> str:
        """Return a token.

        :param target: default: the first host.
        :raises NoTokenError: when the service gives none.
        """
        asked = target or self.services[0]
        reply = self.reply(asked, audience)
        token = reply.json().get("access_token") if reply.status == OK else None
        if not isinstance(token, str):
            raise NoTokenError(f"{asked.service.name} gives the probe no token, so nothing was learnt: {reply}")
        return token
