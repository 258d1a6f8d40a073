# SPDX-License-Identifier: Apache-2.0
"""`make load`: a lab of its own, the example plant deployed on it, loaded, and taken away.

- :func:`main`: `python -m load.lab [options of bednet load]`.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from bednet.errors import BednetError
from load.__main__ import main as load
from load.__main__ import parse
from load.profiles import PROFILES
from load.slo import read_slo
from testbed import engine
from testbed.common import LabError, step
from testbed.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "load"
PROG = "make load"


def main(arguments: Sequence[str]) -> int:
    """Load one gateway of a fresh lab; returns the exit code of `bednet load`."""
    # A lab takes minutes: what can be known to be wrong is told before. The site's folder is that of the lab to come.
    parsed = parse(["SITE", *arguments], PROG)
    try:
        read_slo(parsed.slo, parsed.profile, tuple(PROFILES))
        with Lab.up(NAME, gateways=1, field=False) as lab, engine.in_use():
            with step("Deploying the site: ansible-playbook playbooks/site.yml, over SSH"):
                lab.play("site.yml")
            os.environ |= lab.ansible_env()
            return load([str(lab.site), *arguments], prog=PROG)
    except LabError as error:
        sys.stderr.write(f"{error}\n")
    except BednetError as error:
        sys.stderr.write(f"bednet: {error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
