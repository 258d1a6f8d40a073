# SPDX-License-Identifier: Apache-2.0
"""A deployed lab as the tests see it: what each run of site.yml did.

- :class:`Scenario`: a lab on which site.yml ran in check mode (not always), for real, and again.
- :func:`deploy`: make one of a lab with bare hosts.
- :func:`forget_key_types`: what a lab's copy of the site needs before a CA may have other keys.
- :func:`forget_tokens`: takes the token service out of a lab's copy of the site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from pathlib import Path

    from testbed.lab import Lab, PlayResult

# What a bare gateway has of what the roles bring; asked after the check run.
_TRACES = "dpkg -l mosquitto 2>&1; ls /etc/mosquitto /usr/local/lib/bednet 2>&1; true"


@dataclass(frozen=True)
class Scenario:
    """A lab on which site.yml ran two or three times, and what each run did.

    :ivar _check: what the check run did, if there was one.
    :ivar traces: what it left on the first gateway.
    """

    lab: Lab
    _check: PlayResult | None
    traces: str
    converge: PlayResult
    again: PlayResult

    @property
    def check(self) -> PlayResult:
        """What the check run did, for a test that this lab was made for."""
        assert self._check is not None, "this lab had no check run: mark the test as those that ask for it are"
        return self._check

    @property
    def runs(self) -> tuple[PlayResult, ...]:
        """All runs that there were."""
        return (*(() if self._check is None else (self._check,)), self.converge, self.again)

    @property
    def ca_home(self) -> Path:
        """The CA's folder, where the CA lives on the control machine."""
        return self.lab.folder / "authority"


def forget_key_types(site: Path) -> None:
    """Take the devices' own limits on key types out of a lab's copy of the site, so that any CA will do."""
    file = site / "devices.yml"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(line for line in lines if "key_types:" not in line), encoding="utf-8")


def forget_tokens(site: Path) -> None:
    """Take the token service, and the devices that need it, out of a lab's copy of the site: it takes its time."""
    hosts = yaml.safe_load((site / "hosts.yml").read_text(encoding="utf-8"))
    del hosts["token_service"]
    (site / "hosts.yml").write_text(yaml.safe_dump(hosts), encoding="utf-8")
    cuts = (("policy.yml", "issuers:\n", "\n# These run"), ("devices.yml", "  # Edge computers", ""))
    for name, section, end in cuts:
        text = (site / name).read_text(encoding="utf-8")
        begin = text.index(section)
        rest = text[text.index(end, begin) :] if end else ""
        (site / name).write_text(text[:begin] + rest, encoding="utf-8")


def deploy(lab: Lab, *converge: str, check: bool = True) -> Scenario:
    """Run site.yml on a lab with bare hosts: check, converge, again.

    :param converge: further arguments of ansible-playbook for the run that converges.
    :param check: whether to begin with a check run.
    """
    checked = lab.play("site.yml", "--check") if check else None
    traces = lab.hosts["gateway-1"].exec(["sh", "-c", _TRACES]).stdout
    return Scenario(lab, checked, traces, lab.play("site.yml", *converge), lab.play("site.yml"))
