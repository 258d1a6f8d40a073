# SPDX-License-Identifier: Apache-2.0
"""A site's gateways, as its inventory describes them.

- :func:`describe`: asks Ansible, since variables may stand anywhere.
- :class:`Described`: the gateways, the hosts that generate load, and how they are reached.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from load.identities import CHECKOUT, IdentitiesError, play
from load.plan import Gateway, PlanError

if TYPE_CHECKING:
    from collections.abc import Mapping


SHELL = ("sudo", "-n", "sh", "-s", "--")
PORTS = ("mtls_port", "password_port", "psk_port", "websockets_port")


@dataclass(frozen=True)
class GeneratorHost:
    """A host of the group load_generators.

    :ivar reach: the words of ssh without the target, and the target; both empty for the control machine itself.
    :ivar home: where its Python environment lies.
    :ivar processes: how many processes it runs; 0 is one for each core.
    """

    name: str
    reach: tuple[tuple[str, ...], tuple[str, ...]]
    home: str
    processes: int

    @property
    def shell(self) -> tuple[str, ...]:
        """A command that runs a script given on its standard input, as root."""
        return (*self.reach[0], *self.reach[1], *SHELL)


@dataclass(frozen=True)
class Described:
    """A site's gateways.

    :ivar access_control: `plugin` where all gateways have it, else `acl_file`.
    :ivar token_address: where the site's token service is reached; None where it has none.
    :ivar shells: by gateway, a command that runs a script given on its standard input, as root.
    """

    gateways: tuple[Gateway, ...]
    access_control: str
    shells: Mapping[str, tuple[str, ...]]
    generators: tuple[GeneratorHost, ...] = ()
    token_address: str | None = None

    def gateway(self, name: str | None) -> Gateway:
        """Return a gateway by its name, or the first.

        :raises PlanError: when there is none of that name.
        """
        for gateway in self.gateways:
            if name in (None, gateway.name):
                return gateway
        known = ", ".join(gateway.name for gateway in self.gateways)
        raise PlanError(f"There is no gateway `{name}` in this site. Cure: choose one of {known}.")


def describe(site: Path) -> Described:
    """Ask Ansible about a site's gateways.

    :raises IdentitiesError: when it cannot tell.
    """
    with tempfile.TemporaryDirectory(prefix="bednet-load-") as folder:
        target = Path(folder) / "described.json"
        play(site, CHECKOUT / "load/playbooks/describe.yml", "-e", f"load_described={target}", deadline_s=120)
        try:
            told: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise IdentitiesError(
                f"Ansible told nothing about {site}. Cure: see `ansible-inventory -i {site} --list`."
            ) from exc
    gateways = tuple(
        Gateway(**{key: entry[key] for key in ("name", "address", "server_name", *PORTS)}) for entry in told["gateways"]
    )
    return Described(
        gateways,
        told["access_control"],
        {name: shell(told["hosts"][name]) for name in told["gateway_hosts"]},
        tuple(
            GeneratorHost(entry["name"], reach(told["hosts"][entry["name"]]), entry["home"], entry["processes"])
            for entry in told["generators"]
        ),
        told["token_address"] or None,
    )


def shell(host: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the command that runs a script on a host as root, the way Ansible reaches it."""
    words, target = reach(host)
    return (*words, *target, *SHELL)


def reach(host: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the words of ssh, and its target, that reach a host as Ansible does; nothing for this machine itself."""
    if host["connection"] == "local":
        return (), ()
    words = ["ssh", "-o", "BatchMode=yes", "-p", str(host["port"]), *shlex.split(host["arguments"])]
    if host["key"]:
        words += ["-i", host["key"]]
    target = f"{host['user']}@{host['address']}" if host["user"] else host["address"]
    return tuple(words), (target,)
