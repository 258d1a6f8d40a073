# SPDX-License-Identifier: Apache-2.0
"""A gateway that was taken over, and answers Ansible with what its new owner likes.

The sharp edge: facts outrank what roles and the site say, wherever Ansible turns them into variables. A gateway could
then choose the command that root runs on the CA host, the names in its certificate, and files on the control machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cryptography import x509

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from testbed.lab import Lab
    from tests.scenario import Scenario

# `make test` has no time for it.
pytestmark = [pytest.mark.lab, pytest.mark.full]

PYTHON = "/usr/bin/python3.13"


@pytest.fixture
def lies(lab: Lab, tmp_path: Path) -> Iterator[Path]:
    """gateway-2 answers with facts of its own; returns the file on the control machine that one of them names."""
    gateway, report = lab.hosts["gateway-2"], tmp_path / "report.json"
    facts = (
        '"mosquitto_ca_command": "/usr/bin/tee", "__mosquitto_ca_command": "/usr/bin/tee", '
        '"verification_ca_command": "/usr/bin/tee", "__verification_ca_command": "/usr/bin/tee", '
        '"mosquitto_server_dns": ["gateway-2.plant.example", "gateway-1.plant.example"], '
        f'"verification_report": "{report}", "bednet_no_log": false, '
    )
    gateway.exec(["cp", "--preserve", PYTHON, f"{PYTHON}.real"])
    gateway.write_file(
        "/usr/local/sbin/lying-python",
        f"""#!/bin/sh
{PYTHON}.real "$@" | sed 's|"ansible_facts": {{|&{facts}|'
""",
        mode="0755",
    )
    gateway.exec(["mv", "/usr/local/sbin/lying-python", PYTHON])
    yield report
    gateway.exec(["mv", f"{PYTHON}.real", PYTHON])


def test_a_gateway_that_lies_gets_no_say_elsewhere(lab: Lab, deployment: Scenario, lies: Path) -> None:
    assert deployment.again.failed == 0
    authority, gateway = lab.hosts["authority"], lab.hosts["gateway-2"]
    before = authority.exec(
        ["sh", "-c", "ls -A / /root /home/operator; cat /var/lib/bednet-ca/state/index.json"]
    ).stdout
    certificate = gateway.read_file("/etc/mosquitto/tls/server.pem")
    result = lab.play("site.yml", "--limit", "gateway-2", "--tags", "mosquitto", check=False)
    # The lies were told, or this test shows nothing: they are seen as facts, and nowhere else.
    told = gateway.exec([PYTHON, "-c", "print('{\"ansible_facts\": {}}')"]).stdout
    assert "/usr/bin/tee" in told
    assert result.failed == 0, result.stdout
    after = authority.exec(["sh", "-c", "ls -A / /root /home/operator; cat /var/lib/bednet-ca/state/index.json"]).stdout
    # A probe's certificate was signed; no file appeared, and no server's certificate.
    assert after.partition("{")[0] == before.partition("{")[0]
    assert after.count('"server"') == before.count('"server"')
    assert gateway.read_file("/etc/mosquitto/tls/server.pem") == certificate
    names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == ["gateway-2.plant.example"]
    assert not lies.exists()


def test_ansible_that_lets_hosts_set_variables_is_refused(lab: Lab) -> None:
    result = lab.play("site.yml", check=False, env={"ANSIBLE_INJECT_FACT_VARS": "true"})
    assert result.rc != 0
    assert "would let a taken gateway run commands on the CA host" in " ".join(result.failures[0]["message"].split())
    assert result.changed == 0


def test_the_ca_tools_user_owns_no_folder_that_root_writes_to(lab: Lab) -> None:
    authority = lab.hosts["authority"]
    home = "/var/lib/bednet-ca"
    owners = authority.exec(["stat", "--format=%n %U %a", home, f"{home}/root", f"{home}/issuing"]).stdout
    assert owners.splitlines() == [f"{home} root 750", f"{home}/root root 750", f"{home}/issuing root 750"]
    moved = authority.exec(
        ["runuser", "-u", "bednet-ca", "--", "mv", f"{home}/publish", f"{home}/elsewhere"], check=False
    )
    assert moved.rc != 0
    assert "Permission denied" in moved.stderr
