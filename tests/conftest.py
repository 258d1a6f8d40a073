# SPDX-License-Identifier: Apache-2.0
"""What the suites share: a lab with the example plant deployed on it, and everybody's credentials.

- option ``--lab NAME``: attach to a lab that runs already (``python -m testbed up NAME``, ``... play --lab NAME
  site.yml``) instead of bringing one up; quick while a test is being written.
- fixture ``deployment``: what site.yml did on the lab's bare hosts, in check mode, for real and again.
- fixture ``lab``: the lab, with site.yml run on it.
- fixture ``plant``: the site seen from outside: gateways, devices' credentials, villains, sessions.
- fixture ``attacker``: a hostile host in the plant's network.
"""

from __future__ import annotations

import io
import json
import os
import socket
import ssl
import threading
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from bednet.policy import Access, Effect
from bednet.probe import Credentials, Listener, Session
from bednet.site import Site, load_site
from load.bundles import unpack
from testbed import villains
from testbed.attacker import Attacker
from testbed.lab import Host, Lab
from tests.scenario import Scenario, deploy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BUNDLES = "/var/lib/bednet-ca/bundles"
ISSUING = "/var/lib/bednet-ca/issuing"
MTLS_PORT = 8883
PASSWORD_PORT = 8884
PSK_PORT = 8885
READS = (Effect.ALLOW, Access.SUBSCRIBE)

# How long one example takes says more about what else the machine does than about the code.
settings.register_profile("bednet", deadline=None)
settings.load_profile("bednet")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--lab``."""
    parser.addoption("--lab", metavar="NAME", help="use this running lab, on which site.yml was run, and leave it up")


# Priority and share of the CPU, so that the deployed lab's tests are not held up by those beside them.
STEPPED_BACK = 5
CPU_SHARES = 8192  # others have 1024

# Seconds for a test on a lab: the longest of `make test` takes two minutes on a quiet machine, and seven on a busy one.
LAB_TIMEOUT_S = 1200

# Suites whose tests use the fixture `lab`, and files of tests/roles that bring up labs of their own, the longest first.
ON_THE_LAB = {"authentication", "authorization", "demo", "encryption", "resilience", "roles", "tokens"}
OWN_LAB = (
    "tests/roles/test_alternative.py",
    "tests/roles/test_ca_on_a_gateway.py",
    "tests/roles/test_key_types.py",
    "tests/roles/test_token_service.py",
    "tests/tokens/test_instances.py",
)


def is_on_the_lab(path: str) -> bool:
    """Whether the tests of a file share the deployed lab."""
    return path.split("/")[1] in ON_THE_LAB or path == "tests/load/test_runs.py"


class ByLab(LoadScopeScheduling):  # type: ignore[misc] # it has no types
    """Keeps the tests that share a lab on one worker (``-n 3``); the others go wherever there is time."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        suite = path.split("/")[1]
        if suite == "unit":
            return nodeid.partition("[")[0]
        if path in OWN_LAB:
            return path
        return "the deployed lab" if is_on_the_lab(path) else suite


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByLab:
    """Let :class:`ByLab` hand out the tests."""
    return ByLab(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let the deployed lab's tests go first: they are one after the other, and `make test` takes as long as they do.

    A worker that has once stepped back stays so: the deployed lab's tests are handed out first, and all to one worker.
    """
    if os.environ.get("PYTEST_XDIST_WORKER") and not is_on_the_lab(item.nodeid.partition("::")[0]):
        os.setpriority(os.PRIO_PROCESS, 0, STEPPED_BACK)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the labs that take longest to deploy, so that no worker waits for them in the end; give labs time."""

    def place(item: pytest.Item) -> int:
        path = item.nodeid.partition("::")[0]
        if path in OWN_LAB:
            return 1 + OWN_LAB.index(path)
        suite = path.split("/")[1]
        return 0 if is_on_the_lab(path) else {"testbed": 8, "unit": 9}.get(suite, 7)

    items.sort(key=place)
    for item in items:
        if item.get_closest_marker("lab") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LAB_TIMEOUT_S))


@pytest.fixture(scope="session")
def deployment(request: pytest.FixtureRequest) -> Iterator[Scenario]:
    """A lab on which this run has deployed the example plant: checked (`full`), converged, and run again."""
    if request.config.getoption("--lab"):
        pytest.skip("asks what site.yml did on bare hosts; with --lab it ran before")
    with Lab.up("test") as own:
        for host in own.hosts.values():
            own.docker.containers.get(host.container).update(cpu_shares=CPU_SHARES)
        # The alternative scenario is checked in each run; this one where time is no matter.
        yield deploy(own, check=any(item.get_closest_marker("full") for item in request.session.items))


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab with the example plant deployed on it, for the whole run."""
    name = request.config.getoption("--lab")
    if not name:
        deployed: Scenario = request.getfixturevalue("deployment")
        yield deployed.lab
        return
    attached = Lab.attach(str(name))
    yield attached
    attached.close()


@dataclass
class Plant:
    """The deployed site as devices, an operator and an attacker see it.

    :ivar folder: the bundles of all devices, and certificates that tests make; readable by this user only.
    """

    lab: Lab
    folder: Path
    _made: dict[str, Credentials] = field(default_factory=dict)

    @cached_property
    def site(self) -> Site:
        """The site's devices and policy."""
        return load_site(self.lab.site)

    def fetch_bundles(self) -> None:
        """Bring the bundles over from the CA's host."""
        archive = self.lab.hosts[self.lab.shape.ca].exec(["tar", "-C", BUNDLES, "-cf", "-", "."]).raw
        unpack(io.BytesIO(archive), self.folder)

    @property
    def ca(self) -> Path:
        """What every device trusts."""
        return self.folder / "temp-101/ca.pem"

    @property
    def gateways(self) -> list[Host]:
        """The gateways' hosts."""
        return [self.lab.hosts[name] for name in self.lab.shape.gateway_names]

    def mtls(self, gateway: str = "gateway-1") -> Listener:
        """The listener for certificates."""
        host = self.lab.hosts[gateway]
        return Listener(host.address, MTLS_PORT, self.ca, host.fqdn)

    def passwords(self, gateway: str = "gateway-1") -> Listener:
        """The listener for user names and passwords."""
        host = self.lab.hosts[gateway]
        return Listener(host.address, PASSWORD_PORT, self.ca, host.fqdn)

    def keys(self, gateway: str = "gateway-1") -> Listener:
        """The listener for pre-shared keys; there is no certificate that could be checked."""
        return Listener(self.lab.hosts[gateway].address, PSK_PORT)

    @property
    def with_certificate(self) -> list[str]:
        """The devices that hold a certificate and its key, and may come in with that alone."""
        return [
            name
            for name, device in self.site.devices.items()
            if "certificate" in device.authentication and (self.folder / name / "key.pem").exists()
        ]

    @property
    def with_password(self) -> list[str]:
        """The devices that hold a password."""
        return [name for name in self.site.devices if (self.folder / name / "password").exists()]

    def certificate(self, device: str) -> Credentials:
        """A device's certificate and key."""
        return Credentials(self.folder / device / "certificate.pem", self.folder / device / "key.pem")

    def password(self, device: str) -> Credentials:
        """A device's user name and password."""
        return Credentials(username=device, password=(self.folder / device / "password").read_text().strip())

    @cached_property
    def filters(self) -> list[str]:
        """Each filter that somebody may subscribe to, but for those of the broker's own figures."""
        grants = [grant for name in self.site.devices for grant in self.site.grants[name]]
        found = {grant.topic_filter for grant in grants if (grant.rule.effect, grant.rule.access) == READS}
        return sorted(name for name in found if not name.startswith("$"))

    def session(self, device: str, gateway: str = "gateway-1", **how: Any) -> Session:
        """A device's session, with its certificate where it has one, else with its password; to be entered."""
        if (self.folder / device / "key.pem").exists():
            return Session(self.mtls(gateway), self.certificate(device), **how)
        return Session(self.passwords(gateway), self.password(device), **how)

    @cached_property
    def issuing(self) -> villains.Credential:
        """The issuing CA's certificate and key, out of the lab's CA host: villains are made with it."""
        host = self.lab.hosts[self.lab.shape.ca]
        return villains.Credential(host.read_file(f"{ISSUING}/issuing.pem"), host.read_file(f"{ISSUING}/issuing.key"))

    def keep(self, name: str, credential: villains.Credential) -> Credentials:
        """Write a certificate and its key into files."""
        folder = self.folder / "made"
        folder.mkdir(mode=0o700, exist_ok=True)
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        certificate.write_bytes(credential.certificate)
        key.touch(mode=0o600)
        key.write_bytes(credential.key)
        return Credentials(certificate, key)

    def other_certificate(self, device: str) -> Credentials:
        """Make a second certificate for a device, as good as its own."""
        return self.keep(f"other-{device}", villains.credential_of(self.issuing, device, self.now()))

    @staticmethod
    def serial(credentials: Credentials) -> int:
        """Return the serial number of a certificate."""
        assert credentials.certificate is not None
        return x509.load_pem_x509_certificate(credentials.certificate.read_bytes()).serial_number

    @contextmanager
    def files_on(self, host: Host, device: str) -> Iterator[list[str]]:
        """Put a device's certificate and key onto a host; returns mosquitto_pub's options for them."""
        folder = f"/run/plant-{device}"
        host.exec(["mkdir", "-p", "-m", "0700", folder])
        try:
            for name in ("ca.pem", "certificate.pem", "key.pem"):
                host.write_file(f"{folder}/{name}", (self.folder / device / name).read_bytes(), mode="0600")
            yield [
                *("--cafile", f"{folder}/ca.pem", "--cert", f"{folder}/certificate.pem"),
                *("--key", f"{folder}/key.pem"),
            ]
        finally:
            host.exec(["rm", "-rf", folder])

    def villain(self, kind: str) -> Credentials:
        """A certificate that must be refused, in the name of temp-101; made once."""
        if kind not in self._made:
            self._made[kind] = self.keep(kind, villains.make(kind, self.issuing, now=self.now()))
        return self._made[kind]

    @staticmethod
    def now() -> datetime:
        """Return the time; live gateways look at the real clock."""
        return datetime.now(UTC)

    @cached_property
    def _probe(self) -> tuple[Credentials, Credentials]:
        """The identity of `bednet verify`, and the canary, as the CA hands them out."""
        host = self.lab.hosts[self.lab.shape.ca]
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bednet-probe")])
        csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
        request = {"csr": csr.public_bytes(serialization.Encoding.PEM).decode(), "days": 1}
        told = json.loads(host.exec(["bednet-ca", "probe"], input=json.dumps(request)).stdout)
        key_pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return (
            self.keep("bednet-probe", villains.Credential(told["chain"].encode(), key_pem)),
            self.keep(
                "bednet-canary",
                villains.Credential(told["canary_certificate"].encode(), told["canary_key"].encode()),
            ),
        )

    def canary(self) -> Credentials:
        """The certificate that was revoked right after it was issued."""
        return self._probe[1]

    def probe(self, gateway: str = "gateway-1") -> Session:
        """A session of the identity of `bednet verify`; to be entered."""
        return Session(self.mtls(gateway), self._probe[0])

    @contextmanager
    def false_gateway(self, credentials: Credentials) -> Iterator[int]:
        """Listen on this machine with a certificate, for one handshake; returns the port."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        assert credentials.certificate is not None
        context.load_cert_chain(credentials.certificate, credentials.key)
        with socket.create_server(("127.0.0.1", 0)) as server:

            def serve() -> None:
                connection, _ = server.accept()
                # Whoever does not trust us hangs up in the middle.
                with connection, suppress(OSError), context.wrap_socket(connection, server_side=True) as tls:
                    tls.recv(1)

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                yield server.getsockname()[1]
            finally:
                thread.join(10)


@pytest.fixture(scope="session")
def plant(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Plant:
    """The deployed site, for the whole run."""
    folder = tmp_path_factory.mktemp("bundles")
    folder.chmod(0o700)
    found = Plant(lab, folder)
    found.fetch_bundles()
    return found


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Says what was measured: the sentence stands at the end of the run's output."""

    def say(sentence: str) -> None:
        # These travel from a worker to the process that prints.
        request.node.user_properties.append(("measured", sentence))

    return say


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the tests measured."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind if hasattr(report, "when")]
    sentences = [
        text
        for report in reports
        if report.when == "call"
        for name, text in report.user_properties
        if name == "measured"
    ]
    if sentences:
        terminalreporter.section("measured")
        for sentence in sentences:
            terminalreporter.line(sentence)


@pytest.fixture(scope="session")
def attacker(lab: Lab) -> Attacker:
    """A hostile host in the plant's network."""
    return Attacker(lab)


@pytest.fixture(scope="module")
def everyone(plant: Plant) -> Iterator[dict[str, Session]]:
    """A session on gateway-1 for each device of the plant, in MQTT 5, each subscribed to all that it is granted.

    Each asks for everything, and for whatever anybody may read.
    """
    with ExitStack() as stack:
        sessions = {}
        for name in sorted({*plant.with_certificate, *plant.with_password}):
            sessions[name] = stack.enter_context(plant.session(name))
            sessions[name].subscribe("#", *plant.filters)
        yield sessions
