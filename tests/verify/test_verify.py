# SPDX-License-Identifier: Apache-2.0
"""`bednet verify` must never pass on a net that does not bite.

The sharp edge: each broker here is lax in one way, and exactly the checks that look at it must fail - all of them, or a
hole goes unseen; no others, or nobody believes the report. A strict broker, the control, passes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import threading
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from rich.console import Console

from bednet.probe import Credentials
from bednet.verify import run
from bednet.verify.check import LAYERS
from bednet.verify.gateway import GATEWAY_CHECKS, REACHABLE
from bednet.verify.report import Report, Result, read_report
from bednet.verify.run import verify
from bednet.verify.service import SERVICE_CHECKS
from bednet.verify.table import summary, table
from bednet.verify.task import Gateway, Input, Scope, VerifyError, read_input
from bednet.verify.verdict import Verdict
from testbed.lab import Lab
from tests.verify import brokers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from bednet.verify.target import Target

SERVER = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH

PUBLISHES = {
    "a forbidden publish is refused",
    "a forbidden publish of MQTT 3.1.1 is dropped",
    "a will on a forbidden topic is dropped",
    "nothing is retained on a forbidden topic",
}
FILTERS = {
    "# shows nothing of others",
    "+ shows nothing of others",
    "a shared subscription shows nothing of others",
    "a forbidden subscription shows nothing",
}
PASSWORDS = {
    "a wrong password is refused",
    "an empty password is refused",
    "a token that nobody signed is refused",
    "an unknown user is refused",
}


@pytest.fixture(scope="session")
def stage(request: pytest.FixtureRequest) -> Iterator[brokers.Stage]:
    """Where brokers run: a host of their own, a gateway of --lab, or here if BEDNET_MOSQUITTO names the program."""
    if program := os.environ.get("BEDNET_MOSQUITTO"):
        yield brokers.LocalStage(program)
        return
    if request.config.getoption("--lab"):
        yield brokers.LabStage(request.getfixturevalue("lab").hosts["gateway-1"])
        return
    # Not the deployed lab: a worker that has nothing else to do can take these tests then.
    with Lab.up("brokers", gateways=1, ca="gateway-1", field=False) as own:
        install = "apt-get -qq update && apt-get -qq install --yes --no-install-recommends mosquitto"
        own.hosts["gateway-1"].exec(
            ["sh", "-ec", install], environment={"DEBIAN_FRONTEND": "noninteractive"}, timeout_s=300
        )
        yield brokers.LabStage(own.hosts["gateway-1"])


@pytest.fixture(scope="module")
def made(stage: brokers.Stage, tmp_path_factory: pytest.TempPathFactory) -> brokers.PKI:
    """A CA with the certificates of a strict gateway; tests copy its folder."""
    return brokers.PKI.make(tmp_path_factory.mktemp("pki"), brokers.now(), stage.address)


@pytest.fixture
def pki(made: brokers.PKI, tmp_path: Path) -> brokers.PKI:
    """A copy of the CA that a test may change."""
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    return replace(made, folder=tmp_path)


@pytest.fixture
def local(tmp_path: Path) -> brokers.PKI:
    """A CA for a test that needs no broker."""
    return brokers.PKI.make(tmp_path, brokers.now())


def task(pki: brokers.PKI, *gateways: Gateway, checks: Scope = "all") -> Input:
    canary = Credentials(pki.folder / "canary.pem", pki.folder / "canary.key")
    return Input(gateways, pki.identity(), canary, checks)


def failed(report: Report) -> dict[str, str]:
    """Return the failed checks with their evidence."""
    return {result.check: result.evidence for result in report.results if not result.passed}


@pytest.mark.lab
def test_verify_passes_on_a_strict_broker(stage: brokers.Stage, pki: brokers.PKI) -> None:
    ports = brokers.Ports.some()
    with stage.run(pki.folder, ports, brokers.configuration(ports)):
        report = verify(task(pki, ports.gateway(address=stage.address)), started=brokers.now())
    assert failed(report) == {}
    assert report.passed
    # Those about pre-shared keys and tokens need the plugin: the suites run them on the deployed lab.
    left_out = {check.name for check in GATEWAY_CHECKS} - {result.check for result in report.results}
    assert all("pre-shared key" in name or " token" in name for name in left_out)
    assert len(left_out) == 9


def websockets(port: int, acl_file: str = "acl") -> str:
    """Return the lines of a WebSockets listener like the password listener."""
    return (
        f"listener {port}\nprotocol websockets\ncertfile server.pem\nkeyfile server.key\ntls_version tlsv1.2\n"
        f"ciphers {brokers.STRONG}\nallow_anonymous false\npassword_file passwords\n"
        f"use_username_as_clientid true\nacl_file {acl_file}"
    )


def verify_websockets(stage: brokers.Stage, pki: brokers.PKI, *, openssl: str = "", **how: Any) -> Report:
    """Verify a broker that has a WebSockets listener; its port is 9001."""
    ports = brokers.Ports.some()
    gateway = replace(ports.gateway(address=stage.address), websockets_port=9001)
    acl_file = how.pop("acl_file", "acl")
    text = brokers.configuration(ports, more=websockets(9001, acl_file), **how)
    with stage.run(pki.folder, ports, text, openssl):
        return verify(task(pki, gateway), started=brokers.now())


@pytest.mark.lab
@pytest.mark.full
def test_verify_passes_on_a_strict_broker_with_websockets(stage: brokers.Stage, pki: brokers.PKI) -> None:
    report = verify_websockets(stage, pki, openssl=brokers.AT_LEAST_1_2)
    assert failed(report) == {}
    # It did look there.
    assert sum("9001" in result.evidence for result in report.results) > 25


@pytest.mark.lab
@pytest.mark.full
def test_verify_sees_websockets_without_access_control(stage: brokers.Stage, pki: brokers.PKI) -> None:
    (pki.folder / "open").write_text("topic readwrite #\npattern readwrite #\n")
    found = failed(verify_websockets(stage, pki, openssl=brokers.AT_LEAST_1_2, acl_file="open"))
    assert set(found) == {*PUBLISHES, *FILTERS}
    assert all("9001: NOT: " in evidence for evidence in found.values())


@pytest.mark.lab
@pytest.mark.full
def test_verify_sees_websockets_without_a_limit(stage: brokers.Stage, pki: brokers.PKI) -> None:
    """Mosquitto 2.0 does not hold WebSockets to max_packet_size."""
    found = failed(
        verify_websockets(
            stage, pki, openssl=brokers.AT_LEAST_1_2, max_packet_size=None, global_options="max_packet_size 65536"
        )
    )
    assert set(found) == {"a packet above the limit is refused"}
    assert "9001: NOT: a packet above 65536 bytes was answered" in found["a packet above the limit is refused"]


@dataclass(frozen=True)
class Lax:
    """One way of being lax, and the checks that must fail for it.

    :param sees: words in the evidence of one of them: it was seen for the right reason.
    :param prepare: changes files of the broker before it starts.
    """

    what: str
    fails: set[str]
    sees: str
    both: Mapping[str, str | None] = field(default_factory=dict)
    mtls: Mapping[str, str | None] = field(default_factory=dict)
    password: Mapping[str, str | None] = field(default_factory=dict)
    more: Callable[[brokers.Ports], str] = lambda _: ""
    max_packet_size: int | None = 65536
    prepare: Callable[[brokers.PKI], Any] = lambda _: None


def acl(*rules: str) -> Callable[[brokers.PKI], Any]:
    return lambda pki: (pki.folder / "acl").write_text("\n".join([*rules, brokers.ACL]))


def server(**how: Any) -> Callable[[brokers.PKI], Any]:
    def prepare(pki: brokers.PKI) -> None:
        right = {"dns": [brokers.SERVER_NAME], "ip": [pki.address], "usage": [SERVER]}
        pki.issue("server", brokers.now(), **{**right, **how})

    return prepare


def false_server(pki: brokers.PKI) -> None:
    other = pki.folder / "other"
    other.mkdir()
    brokers.PKI.make(other, brokers.now(), pki.address)
    shutil.copy(other / "server.pem", pki.folder)
    shutil.copy(other / "server.key", pki.folder)


LAX = [
    Lax(
        "plaintext port open",
        {"the plaintext port is closed"},
        "is open; to plaintext MQTT it says: accepted",
        more=lambda ports: f"listener {ports.plaintext}\nallow_anonymous true",
    ),
    Lax(
        "plaintext port open to users with passwords",
        {"the plaintext port is closed"},
        "is open; to plaintext MQTT it says: refused: not authorized",
        more=lambda ports: f"listener {ports.plaintext}\nallow_anonymous false",
    ),
    Lax(
        "a listener that was turned off and still runs",
        {"listeners that are off are closed"},
        "is open; to plaintext MQTT it says: ",
        more=lambda ports: (
            f"listener {ports.off}\ncertfile server.pem\nkeyfile server.key\nallow_anonymous false\n"
            "password_file passwords\nuse_username_as_clientid true\nacl_file acl"
        ),
    ),
    Lax(
        "a forgotten listener without TLS",
        {"listeners that are off are closed"},
        "is open; to plaintext MQTT it says: accepted",
        more=lambda ports: f"listener {ports.off}\nallow_anonymous true",
    ),
    Lax(
        "no TLS on the password listener",
        {"the gateway answers"},
        "does not speak TLS",
        password={"certfile": None, "keyfile": None, "tls_version": None, "ciphers": None},
    ),
    Lax(
        "TLS 1.1 with the same ciphers as TLS 1.0",
        {"TLS versions that are not configured are refused", "CBC ciphers are refused"},
        "accepted: TLS 1.1, ECDHE-ECDSA-AES128-SHA",
        both={"tls_version": "tlsv1.1", "ciphers": f"{brokers.STRONG}:ECDHE-ECDSA-AES128-SHA:@SECLEVEL=0"},
    ),
    Lax(
        "TLS 1.1 on one listener, though no cipher for it",
        {"TLS versions that are not configured are refused"},
        "TLS 1.1 TLS alert: handshake failure, expected the alert protocol version",
        password={"tls_version": "tlsv1.1", "ciphers": f"{brokers.STRONG}:@SECLEVEL=0"},
    ),
    Lax(
        "Mosquitto's default ciphers",
        {"CBC ciphers are refused"},
        "accepted: TLS 1.2, ECDHE-ECDSA-AES",
        both={"ciphers": None},
    ),
    Lax(
        "ciphers without forward secrecy",
        {"ciphers without forward secrecy are refused"},
        "accepted: TLS 1.2, AES128-GCM-SHA256",
        both={"ciphers": f"{brokers.STRONG}:AES128-GCM-SHA256"},
        prepare=server(key=rsa.generate_private_key(65537, 2048)),
    ),
    Lax(
        "a cipher that does not encipher",
        {"broken ciphers are refused"},
        "accepted: TLS 1.2, ECDHE-ECDSA-NULL-SHA",
        mtls={"ciphers": f"{brokers.STRONG}:ECDHE-ECDSA-NULL-SHA:@SECLEVEL=0"},
    ),
    Lax(
        "a server certificate without the gateway's address",
        {"the server's certificate carries its names"},
        "not in the certificate: ",
        prepare=server(ip=[]),
    ),
    Lax(
        "a server certificate for another name",
        # It is looked for by name, so nothing that needs trust works either.
        {"the server's certificate carries its names", "the server's certificate chains to the site's CA"},
        f"not in the certificate: {brokers.SERVER_NAME}",
        prepare=server(dns=["gateway-2.plant.example"]),
    ),
    Lax(
        "a server certificate that is good for clients, too",
        {"the server's certificate is for servers only"},
        "clientAuth, serverAuth",
        prepare=server(usage=[SERVER, CLIENT]),
    ),
    Lax(
        "a server certificate that has expired",
        {"the server's certificate is valid", "the server's certificate chains to the site's CA"},
        "-1 days left",
        prepare=server(ends=timedelta(hours=-1)),
    ),
    Lax(
        "a server certificate of another CA with the same name",
        {"the server's certificate chains to the site's CA"},
        "server not trusted",
        prepare=false_server,
    ),
    Lax(
        "no certificate required",
        {"no certificate is refused"},
        "accepted: TLS 1.3",
        mtls={"require_certificate": "false"},
    ),
    Lax(
        "no revocation list",
        {"a revoked certificate is refused as revoked"},
        "accepted: TLS 1.3",
        mtls={"crlfile": None},
    ),
    Lax(
        "the user name counts, not the certificate",
        {"the identity is the certificate's", "the probe's certificate is accepted"},
        "refused: not authorized",
        mtls={"use_identity_as_username": None},
    ),
    Lax(
        # With client ids bound to user names, clients without one are refused whatever allow_anonymous says.
        "anonymous clients",
        {"nobody gets in without credentials", "the client id is bound to the identity"},
        "MQTT 3.1.1: accepted",
        password={"allow_anonymous": "true", "use_username_as_clientid": None},
    ),
    Lax(
        "passwords not looked at",
        PASSWORDS,
        "MQTT 3.1.1: accepted",
        password={"allow_anonymous": "true", "password_file": None},
    ),
    Lax(
        "client ids not bound to identities",
        {"the client id is bound to the identity"},
        "holds two sessions",
        both={"use_username_as_clientid": None},
    ),
    Lax(
        "client ids not bound on the password listener",
        {"the client id is bound to the identity"},
        "holds two sessions",
        password={"use_username_as_clientid": None},
    ),
    Lax("no access control", {*PUBLISHES, *FILTERS, "$SYS shows nothing"}, "was delivered", both={"acl_file": None}),
    Lax(
        "access control on the certificate listener only",
        {*PUBLISHES, *FILTERS, "$SYS shows nothing"},
        "NOT: a forbidden message was delivered",
        password={"acl_file": None},
    ),
    Lax(
        "access control on the password listener only",
        {*PUBLISHES, *FILTERS, "$SYS shows nothing"},
        "was delivered",
        mtls={"acl_file": None},
    ),
    Lax(
        "everyone may publish everything",
        PUBLISHES,
        "a forbidden message was delivered",
        prepare=acl(f"user {brokers.PROBE}", "topic write #"),
    ),
    Lax(
        "everyone may read everything",
        FILTERS,
        "# shows bednet/probe/write-only/",
        prepare=acl(f"user {brokers.PROBE}", "topic read #"),
    ),
    Lax(
        # In an acl_file # does not match topics that begin with $.
        "everyone may read $SYS",
        {"$SYS shows nothing"},
        "$SYS/# shows $SYS/broker/",
        prepare=acl(f"user {brokers.PROBE}", "topic read $SYS/#"),
    ),
    Lax(
        "the probe's branch is too wide",
        {*PUBLISHES, *FILTERS},
        "was delivered",
        prepare=acl(f"user {brokers.PROBE}", "topic readwrite bednet/#"),
    ),
    Lax(
        "nothing permitted at all",
        {"the probe's own topic works"},
        "refused",
        prepare=lambda pki: (pki.folder / "acl").write_text(""),
    ),
    Lax(
        "no limit to a packet",
        {"a packet above the limit is refused"},
        "a packet above 65536 bytes was answered:",
        max_packet_size=None,
    ),
]


# Where the probe cannot come in with its certificate or may do nothing, what needs it fails as well.
CONSEQUENCES = {
    "no certificate required",  # Mosquitto then asks for none at all
    "the user name counts, not the certificate",
    "nothing permitted at all",
    "a server certificate for another name",
    "a server certificate that has expired",
    "a server certificate of another CA with the same name",
}


@pytest.mark.lab
@pytest.mark.parametrize("lax", LAX, ids=lambda lax: lax.what)
def test_verify_fails_exactly_where_a_broker_is_lax(stage: brokers.Stage, pki: brokers.PKI, lax: Lax) -> None:
    lax.prepare(pki)
    ports = brokers.Ports.some()
    text = brokers.configuration(
        ports,
        both=lax.both,
        mtls=lax.mtls,
        password=lax.password,
        more=lax.more(ports),
        max_packet_size=lax.max_packet_size,
    )
    with stage.run(pki.folder, ports, text):
        report = verify(task(pki, ports.gateway(address=stage.address)), started=brokers.now())
    assert not report.passed
    found = failed(report)
    assert any(lax.sees in evidence for evidence in found.values()), found
    if lax.what in CONSEQUENCES:
        assert lax.fails <= set(found)
    else:
        assert set(found) == lax.fails, found


BITES = {
    "plaintext port open": "the plaintext port is closed",
    "no TLS on the password listener": "the gateway answers",
    "no certificate required": "no certificate is refused",
    "no revocation list": "a revoked certificate is refused as revoked",
    "anonymous clients": "nobody gets in without credentials",
    "no access control": "a forbidden publish is refused",
    "access control on the certificate listener only": "a forbidden publish is refused",
    "everyone may publish everything": "a forbidden publish is refused",
    "nothing permitted at all": "the probe's own topic works",
}


@pytest.mark.lab
@pytest.mark.parametrize("what", BITES)
def test_the_few_checks_that_end_a_deployment_bite(stage: brokers.Stage, pki: brokers.PKI, what: str) -> None:
    lax = next(item for item in LAX if item.what == what)
    lax.prepare(pki)
    ports = brokers.Ports.some()
    text = brokers.configuration(ports, both=lax.both, mtls=lax.mtls, password=lax.password, more=lax.more(ports))
    with stage.run(pki.folder, ports, text):
        report = verify(task(pki, ports.gateway(address=stage.address), checks="bite"), started=brokers.now())
    assert not report.passed
    assert BITES[what] in failed(report)
    assert len(report.results) < len(GATEWAY_CHECKS)


def test_a_gateway_that_is_down_is_one_clear_failure(local: brokers.PKI) -> None:
    report = verify(task(local, brokers.Ports.some().gateway()), started=brokers.now())
    assert not report.passed
    assert [result.check for result in report.results] == ["the gateway answers"]
    assert "connection refused" in report.results[0].evidence


@pytest.fixture
def mute() -> Iterator[brokers.Ports]:
    """Two ports that accept connections and never say a word."""
    servers = [socket.create_server((brokers.LOCAL, 0)) for _ in range(2)]
    free = brokers.Ports.some()
    yield brokers.Ports(servers[0].getsockname()[1], servers[1].getsockname()[1], free.plaintext, free.off)
    for server in servers:
        server.close()


def test_a_gateway_that_says_nothing_fails_in_bounded_time(local: brokers.PKI, mute: brokers.Ports) -> None:
    report = verify(task(local, mute.gateway()), started=brokers.now())
    assert [result.check for result in report.results] == ["the gateway answers"]
    assert "no answer in time" in report.results[0].evidence
    assert report.seconds < 12


@pytest.fixture
def yes_man() -> Iterator[brokers.Ports]:
    """A server that answers everything on every port with a CONNACK that says yes, without TLS."""
    servers = [socket.create_server((brokers.LOCAL, 0)) for _ in range(4)]

    def serve(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.recv(4096)
                connection.sendall(b"\x20\x02\x00\x00")

    threads = [threading.Thread(target=serve, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    yield brokers.Ports(*(server.getsockname()[1] for server in servers))
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
    for thread in threads:
        thread.join()


def test_a_server_that_says_yes_to_everything_does_not_pass(local: brokers.PKI, yes_man: brokers.Ports) -> None:
    report = verify(task(local, yes_man.gateway()), started=brokers.now())
    assert not report.passed
    assert "does not speak TLS" in failed(report)["the gateway answers"]


@pytest.mark.lab
def test_one_lax_gateway_among_good_ones_fails_the_report(stage: brokers.Stage, pki: brokers.PKI) -> None:
    good, bad = brokers.Ports.some(), brokers.Ports.some()
    with (
        stage.run(pki.folder, good, brokers.configuration(good)),
        stage.run(pki.folder, bad, brokers.configuration(bad, mtls={"crlfile": None})),
    ):
        gateways = good.gateway("good", stage.address), bad.gateway("bad", stage.address)
        report = verify(task(pki, *gateways), started=brokers.now())
    assert not report.passed
    assert {(result.gateway, result.check) for result in report.results if not result.passed} == {
        ("bad", "a revoked certificate is refused as revoked")
    }
    assert report.seconds < 15


def result(**changes: Any) -> Result:
    return replace(Result("encryption", "the gateway answers", "gateway-1", "speaks TLS", True), **changes)


def report_of(*results: Result, expected: dict[str, int] | None = None) -> Report:
    return Report(brokers.now(), 1.0, "all", {"gateway-1": 1} if expected is None else expected, results)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (report_of(), "Nothing is proven"),
        (report_of(result(), expected={"gateway-1": 2}), "Nothing is proven"),
        (report_of(result(), expected={"gateway-1": 1, "gateway-2": 1}), "Nothing is proven"),
        (report_of(result(), expected={"gateway-1": 1, "gateway-2": 0}), "Nothing is proven"),
        (report_of(expected={}), "Nothing is proven"),
        (report_of(result(passed=False)), "does NOT hold: 1 of 1"),
    ],
    ids=["nothing ran", "a check is missing", "a gateway is missing", "no check for a gateway", "no gateway", "failed"],
)
def test_a_report_passes_only_if_everything_ran(report: Report, words: str) -> None:
    assert not report.passed
    assert words in summary(report)


def test_a_report_with_all_results_passes() -> None:
    assert report_of(result()).passed


def test_a_check_that_breaks_is_a_failure_and_not_a_traceback(
    local: brokers.PKI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Target) -> Verdict:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(run, "REACHABLE", replace(REACHABLE, run=broken))
    report = verify(task(local, brokers.Ports.some().gateway()), started=brokers.now())
    assert "the check itself failed: ZeroDivisionError: oops" in failed(report)["the gateway answers"]


def test_a_gateway_cannot_speak_to_the_terminal() -> None:
    assert Verdict(False, "reason \x1b[2J\x07 of its own").evidence == "reason \ufffd[2J\ufffd of its own"
    assert len(Verdict(False, "x" * 100_000).evidence) == 1003


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = report_of(result(), result(check="another", passed=False))
    report.write(tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report


def test_a_report_is_readable_at_100_columns() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    checks = [(check.name, check.layer) for check in GATEWAY_CHECKS]
    services = [(check.name, check.layer) for check in SERVICE_CHECKS]
    results = [result(check=name, layer=layer) for name, layer in checks]
    results += [result(check=name, layer=layer, gateway="gateway-1:8443") for name, layer in services]
    console.print(table(report_of(*results)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    for name, _ in (*checks, *services):
        assert name.split()[0] in text
    # Each layer and each check once, whoever it was held against.
    assert [text.count(f" {layer} ") for layer in LAYERS] == [1] * len(LAYERS)
    assert sum("CBC ciphers" in line for line in text.splitlines()) == 1


def written(pki: brokers.PKI, **changes: Any) -> Path:
    """Write an input file as the role does, changed."""
    identity = pki.identity()
    (pki.folder / "password").write_text(identity.password)
    document = {
        "gateways": [{"name": "gateway-1", "address": "192.0.2.1", "server_name": "gateway-1.plant.example"}],
        "identity": {
            "id": identity.id,
            "certificate": str(identity.certificate),
            "key": str(identity.key),
            "ca": str(identity.ca),
            "password_file": str(pki.folder / "password"),
        },
        "canary": {"certificate": str(pki.folder / "canary.pem"), "key": str(pki.folder / "canary.key")},
        "checks": "all",
        **changes,
    }
    path = pki.folder / "input.json"
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    return path


def test_input_is_read_with_its_defaults(local: brokers.PKI) -> None:
    read = read_input(written(local))
    assert read.gateways[0].mtls_port == 8883
    assert brokers.PASSWORD not in repr(read)


SERVICE = {"name": "t", "address": "192.0.2.1", "server_name": "tokens.plant.example"}
GATEWAY = {"name": "g", "address": "192.0.2.1", "server_name": "g.plant.example"}


@pytest.mark.parametrize(
    ("listeners", "off"),
    [
        ({}, (8885, 9001)),
        ({"password_port": None}, (8884, 8885, 9001)),
        ({"websockets_port": 9001}, (8885,)),
        # One that was moved leaves its usual port closed, and one that was moved to another's usual port is no mistake.
        ({"mtls_port": 18883, "password_port": 18884, "websockets_port": 19001}, (8883, 8884, 8885, 9001)),
        ({"password_port": 9001}, (8884, 8885)),
        # The check of plaintext looks there already.
        ({"plaintext_port": 8885}, (9001,)),
        ({"closed_ports": [8080]}, (8080,)),
        ({"closed_ports": []}, ()),
    ],
)
def test_the_usual_ports_of_listeners_that_are_off_must_be_closed(
    local: brokers.PKI, listeners: dict[str, Any], off: tuple[int, ...]
) -> None:
    assert read_input(written(local, gateways=[{**GATEWAY, **listeners}])).gateways[0].off == off


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gateways": []}, "no gateway to verify"),
        ({"gateways": None}, "'gateways' is missing"),
        ({"gateways": [GATEWAY, GATEWAY]}, "two gateways have the same name"),
        ({"gateways": [{**GATEWAY, "tls_version": "1.2"}]}, "gateway 1: unknown key tls_version"),
        ({"gateways": [{**GATEWAY, "tls_versions": []}]}, "tls_versions is"),
        ({"gateways": [{**GATEWAY, "tls_versions": ["1.1"]}]}, "tls_versions is"),
        ({"gateways": [{**GATEWAY, "mtls_port": "8883"}]}, "mtls_port is not a number"),
        ({"gateways": [{**GATEWAY, "websockets_port": True}]}, "websockets_port is neither a number nor null"),
        ({"gateways": [{**GATEWAY, "closed_ports": ["8884"]}]}, r"closed_ports is \['8884'\], expected numbers"),
        ({"gateways": [{**GATEWAY, "closed_ports": 8884}]}, "not what the role `verification` writes"),
        ({"gateways": [{"name": "g"}]}, "address"),
        ({"checks": "some"}, 'expected "bite" or "all"'),
        ({"canary": {"certificate": "/nowhere/c.pem", "key": "/nowhere/c.key"}}, "there is no file /nowhere/c.pem"),
        ({"canary": None}, "'canary' is missing"),
        ({"surprise": 1}, "unknown key surprise"),
        ({"token_services": [SERVICE, SERVICE]}, "has the name of another one, or of a gateway"),
        ({"token_services": [{**SERVICE, "name": "gateway-1"}]}, "has the name of another one, or of a gateway"),
        ({"token_services": [{**SERVICE, "tls_versions": ["1.1"]}]}, "token service 1: tls_versions is"),
        ({"token_services": [{**SERVICE, "port": "8443"}]}, "token service 1: port is not a number"),
        ({"token_services": [{**SERVICE, "audiences": [1]}]}, "token service 1: audiences is"),
        ({"token_services": [{**SERVICE, "ca": "/etc/ca.pem"}]}, "token service 1: unknown key ca"),
        ({"token_services": {}}, "expected a list"),
    ],
)
def test_input_that_cannot_be_used_is_refused(local: brokers.PKI, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        read_input(written(local, **changes))


def test_an_empty_password_file_is_refused(local: brokers.PKI) -> None:
    path = written(local)
    (local.folder / "password").write_text("\n")
    with pytest.raises(VerifyError, match="the password file is empty"):
        read_input(path)
