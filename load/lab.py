# SPDX-License-Identifier: Apache-2.0
"""`make load`: a lab of its own, the example plant deployed on it, loaded, and taken away.

- :func:`main`: `python -m load.lab [options of bednet load]`.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from bednet.errors import BednetError
from load.__main__ import execute, parse
from load.profiles import PROFILES
from load.slo import read_slo
from testbed import engine
from testbed.common import LabError, step
from testbed.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.lab import Host

NAME = "load"
PROG = "make load"
#: Short, so that a gateway at its limit does not stand still for long at a time.
_PERIOD_US = 10_000


def main(arguments: Sequence[str]) -> int:
    """Load one gateway of a fresh lab; returns the exit code of `bednet load`."""
    # A lab takes minutes: what can be known to be wrong is told before. The site's folder is that of the lab to come.
    parsed = parse(["SITE", *arguments], PROG, lab=True)
    if parsed.restart_broker is None:
        # Nobody else is on this gateway.
        parsed.restart_broker = bool(PROFILES[parsed.profile].cut_at)
    notes = ["The gateway was a container of a lab, on the generator's own machine: both shared its cores."]
    try:
        read_slo(parsed.slo, parsed.profile, tuple(PROFILES))
        with Lab.up(NAME, gateways=1, field=False) as lab, engine.in_use():
            with step("Deploying the site: ansible-playbook playbooks/site.yml, over SSH"):
                lab.play("site.yml")
            os.environ |= lab.ansible_env()
            parsed.site = lab.site
            if parsed.gateway_cpu:
                limit_cpu(lab.hosts["gateway-1"], parsed.gateway_cpu)
                notes.append(
                    f"The gateway had {parsed.gateway_cpu} % of a core and no more, as a stand-in for a small one."
                )
            return execute(parsed, notes)
    except LabError as error:
        sys.stderr.write(f"{error}\n")
    except BednetError as error:
        sys.stderr.write(f"bednet: {error}\n")
    return 1


def limit_cpu(host: Host, percent: int) -> None:
    """Give a host of a lab so much of one core, and no more."""
    connection = engine.client()
    try:
        connection.api.update_container(host.container, cpu_period=_PERIOD_US, cpu_quota=percent * _PERIOD_US // 100)
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
