# SPDX-License-Identifier: Apache-2.0
"""What tokens cost: ``python -m load.bench.tokens`` measures services and connections; prints JSON.

- The token service as the role sets it up, nginx in front, and oidc-provider (npm) behind the same nginx: CPU and time
  for one token, tokens a second, memory; beside the limit, which is the same handshake and one signature alone.
- A broker with bednet's plugin: a connection with a certificate and a token, new to the broker or the one of before,
  beside one with the certificate alone; the limit is the latter and the check of one signature.

Each token is asked for on a connection of its own with a full handshake, as devices do that renew seldom.
"""

from __future__ import annotations

import base64
import contextlib
import getpass
import json
import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import jinja2
import yaml
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from load.bench.brokers import BEDNET, OPENSSL, Broker, Mosquitto, Server, compiled_site
from load.bench.measure import connects
from load.bench.peers import FOLDER, versions
from load.bench.rounds import machine, more_files, programs_of, programs_parser, say
from load.bench.stage import SERVER, Kind, Programs, Stage, device
from load.bench.wire import WireError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ISSUER, AUDIENCE = "https://tokens.bench:8443", "mqtts://bench"
OURS, OIDC = "bednet's token service", "oidc-provider"
WITHOUT, WITH, AGAIN = "a certificate", "a certificate and a new token", "a certificate and the same token again"
#: The device that gets tokens and connects with them; as in :mod:`load.bench.measure`.
DEVICE = device(30)
TOKENS, HANDSHAKES, SIGNATURES = 40, 50, 500
#: How often in a round connections without a token, with a new one and with the same again are measured in turn, and
#: how many each time: few, so that a machine whose speed drifts is as fast for the ones as for the others, and what
#: else disturbs it spoils few of the ratios.
TURNS, CONNECTIONS = 20, 10
CLIENTS, LOADED_S = 4, 1.5
_ROLE = Path(__file__).resolve().parents[2] / "roles/token_service"
_REQUEST = "POST /token HTTP/1.1\r\nHost: tokens.bench:8443\r\nConnection: close\r\n"
_TIMEOUT_S = 30
# One device stands for all, and gets more tokens than one may: that is not asked, which costs a look into an index.
_ONE_DEVICE = """
from bednet.token_service import create_app
from bednet.token_service.service import Service

Service._check_number = staticmethod(lambda *_: None)
"""


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: tokens.bench:8443\r\nConnection: close\r\n\r\n".encode()


def _exchange(channel: socket.socket, request: bytes) -> bytes:
    """Send a request and read until the other side closes. :returns: the body of an answer 200."""
    channel.sendall(request)
    answer = b""
    with contextlib.suppress(ssl.SSLEOFError):
        while more := channel.recv(65_536):
            answer += more
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith((b"HTTP/1.1 200 ", b"HTTP/1.0 200 ")):
        raise WireError(f"the service answered {head.splitlines()[:1]} {body[:300]!r}")
    return body


class App(Broker):
    """A service behind a Unix socket."""

    mqtt = tls = False
    family = True
    #: What answers once it is up.
    path = "/"

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.folder / "app.sock"

    def ready(self) -> None:
        """See :meth:`load.bench.brokers.Broker.ready`."""
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(_TIMEOUT_S)
            channel.connect(str(self.socket))
            _exchange(channel, _get(self.path))

    def body(self) -> str:
        """Return the form that asks for a token."""
        return f"grant_type=client_credentials&client_id={DEVICE}"


class TokenService(App):
    """bednet's, with Debian's packages and gunicorn."""

    path = "/jwks.json"

    def _tool(self, *words: str, given: str = "{}") -> Any:
        command = [sys.executable, "-m", "bednet.token_service", "--config", str(self._config), *words]
        environment = {**os.environ, **self.environment()}
        done = subprocess.run(command, check=True, input=given, capture_output=True, text=True, env=environment)
        return json.loads(done.stdout)

    @property
    def _config(self) -> Path:
        return self.folder / "config.json"

    def prepare(self) -> None:
        """Make its database and its key."""
        (self.folder / "keys").mkdir(mode=0o700)
        self._config.write_text(
            json.dumps(
                {
                    "issuer": ISSUER,
                    "audiences": [AUDIENCE],
                    "database": f"sqlite:///{self.folder}/tokens.db",
                    "keys_dir": str(self.folder / "keys"),
                }
            )
        )
        site = self.folder / "site.jsonl"
        site.write_text("".join(site_with_tokens()))
        self._tool("migrate")
        self._tool("apply", str(site), given='{"client_secrets": {}, "certificates": {}, "revoked_serials": {}}')
        self._tool("rotate", "--if-none")
        (self.folder / "one_device.py").write_text(_ONE_DEVICE)

    def keys(self) -> str:
        """Return its public keys, as a JWKS."""
        return json.dumps(self._tool("keys"))

    def command(self) -> Sequence[str]:
        """See :meth:`load.bench.brokers.Broker.command`."""
        application = f'one_device:create_app("{self._config}")'
        words = ["/usr/bin/gunicorn", "--config", "python:bednet.token_service.server"]
        return [*words, "--bind", f"unix:{self.socket}", application]

    def environment(self) -> Mapping[str, str]:
        """Return what the role's unit sets: none of the pinned packages, but Debian's."""
        source = Path(__file__).resolve().parents[2] / "src"
        return {"PYTHONPATH": f"{source}:{self.folder}", "MALLOC_ARENA_MAX": "2"}

    def version(self) -> str:
        """See :meth:`load.bench.brokers.Broker.version`."""
        return OURS


class OidcProvider(App):
    """oidc-provider, from npm."""

    path = "/jwks"

    def prepare(self) -> None:
        """See :meth:`load.bench.brokers.Broker.prepare`."""
        if self.stage.programs.node_modules is None:
            raise FileNotFoundError("npm's packages could not be had")
        shutil.copy(FOLDER / "oidc.mjs", self.folder)
        (self.folder / "node_modules").symlink_to(self.stage.programs.node_modules)

    def command(self) -> Sequence[str]:
        """See :meth:`load.bench.brokers.Broker.command`."""
        return ["node", "oidc.mjs", str(self.socket), ISSUER, AUDIENCE, DEVICE]

    def environment(self) -> Mapping[str, str]:
        """See :meth:`load.bench.brokers.Broker.environment`."""
        return {"NODE_ENV": "production"}

    def version(self) -> str:
        """See :meth:`load.bench.brokers.Broker.version`."""
        return f"oidc-provider {versions()['oidc-provider']}"

    def body(self) -> str:
        """See :meth:`App.body`."""
        return f"{super().body()}&scope=plant"


class Front(Broker):
    """nginx with the role's configuration, in front of a service."""

    mqtt = False
    family = True

    def __init__(self, stage: Stage, app: App) -> None:
        self.app = app
        super().__init__(stage, Kind(f"nginx in front of {app.kind}"))

    def command(self) -> Sequence[str]:
        """See :meth:`load.bench.brokers.Broker.command`."""
        tls = self.folder / "tls"
        if not tls.exists():
            tls.mkdir()
            certificate, key = self.stage.identity(SERVER)
            for name, path in (("server.pem", certificate), ("server.key", key), ("ca.pem", self.stage.ca)):
                shutil.copy(path, tls / name)
        path = self.folder / "nginx.conf"
        path.write_text(nginx_configuration(self.folder, tls, self.app.socket, self.port))
        # As another user it could not be looked at.
        return ["nginx", "-e", "stderr", "-g", f"user {getpass.getuser()};", "-c", str(path)]

    def ready(self) -> None:
        """See :meth:`load.bench.brokers.Broker.ready`.

        :raises WireError: when its tokens are not what is compared: JWTs by ES256, bound to the certificate.
        """
        header, claims = (json.loads(base64.urlsafe_b64decode(f"{part}==")) for part in self.token().split(".")[:2])
        if header["alg"] != "ES256" or "x5t#S256" not in claims.get("cnf", {}):
            raise WireError(f"its token is another one: {header['alg']}, {sorted(claims)}")

    def _find_members(self) -> list[int]:
        # nginx's cache loader, which has nothing to load, goes after a minute.
        titles = {member: Path(f"/proc/{member}/cmdline").read_bytes() for member in super()._find_members()}
        return [member for member, title in titles.items() if b"cache loader" not in title]

    def token(self) -> str:
        """Get a token, on a connection with a full handshake."""
        body = self.app.body()
        head = f"{_REQUEST}Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {len(body)}\r\n\r\n"
        plain = socket.create_connection(("127.0.0.1", self.port), _TIMEOUT_S)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.stage.context(DEVICE).wrap_socket(plain, server_hostname="127.0.0.1") as channel:
            token = json.loads(_exchange(channel, (head + body).encode()))["access_token"]
        assert isinstance(token, str)
        return token

    def cpu_s(self) -> float:
        """Return the CPU time of both."""
        return super().cpu_s() + self.app.cpu_s()

    def memory_bytes(self) -> int:
        """Return the memory of both; what processes share is shared out among them."""
        total = 0
        for member in (*self.members, *self.app.members):
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        return total


def nginx_configuration(folder: Path, tls: Path, upstream: Path, port: int) -> str:
    """Return the role's configuration of nginx, but for limits that a benchmark would run into.

    :raises jinja2.UndefinedError: when the role's template wants what this does not know.
    """
    values: dict[str, Any] = {}
    for name in ("defaults", "vars"):
        values |= yaml.safe_load((_ROLE / name / "main.yml").read_text(encoding="utf-8"))
    values |= {
        "ansible_managed": "made for a benchmark",
        "token_service_name": urlsplit(ISSUER).hostname,
        "token_service_port": port,
        "token_service_bind_address": "127.0.0.1",
        "token_service_requests_per_second": 1_000_000,
        "token_service_burst": 1_000_000,
        "token_service_connections": 60_000,
        "__token_service_tls_dir": str(tls),
        "__token_service_nginx_cache": f"{folder}/cache",
        "__token_service_socket": str(upstream),
    }
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)  # noqa: S701 - no HTML
    text = (_ROLE / "templates/nginx.conf.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(values).replace("/run/bednet-token-nginx/", f"{folder}/")


def site_with_tokens() -> Iterator[str]:
    """Yield the lines of a compiled site whose device has a certificate and may show a token besides."""
    header, *lines = compiled_site(100)
    first = json.loads(header)
    yield json.dumps({**first, "issuers": 1}) + "\n"
    yield from lines[: first["profiles"]]
    issuer = {"issuer": ISSUER, "name": "site", "service": True, "audience": [AUDIENCE], "algorithms": ["ES256"]}
    issuer |= {"leeway": 30, "longest": 3600, "typ": ["at+jwt"], "scope": "aif", "claim": "sub", "prefix": ""}
    yield json.dumps({**issuer, "roles": None, "keys": None, "jwks_url": None}) + "\n"
    for line in lines[first["profiles"] :]:
        entry = json.loads(line)
        if entry["device"] == DEVICE:
            entry |= {"authentication": ["certificate", "token"], "token": "tls_client_auth"}
        yield json.dumps(entry) + "\n"


class Gateway(Mosquitto):
    """A broker with bednet's plugin that knows the service's keys."""

    def __init__(self, stage: Stage, jwks: str) -> None:
        self._jwks = jwks
        super().__init__(stage, Kind("gateway"), BEDNET)

    def prepare(self) -> None:
        """See :meth:`load.bench.brokers.Broker.prepare`."""
        compiled = self.folder / "compiled.jsonl"
        compiled.write_text("".join(site_with_tokens()))
        nothing = json.dumps({"passwords": {}, "psk": {}, "revoked_serials": {}})
        for words, given in ((["apply", str(compiled)], nothing), (["keys", ISSUER], self._jwks)):
            command = [sys.executable, "-m", "bednet.store", "--store", str(self.store), *words]
            subprocess.run(command, check=True, input=given, stdout=subprocess.DEVNULL, text=True)


def signature_ms(count: int) -> float:
    """Return the CPU milliseconds of an ES256 signature."""
    key, text = ec.generate_private_key(ec.SECP256R1()), os.urandom(600)
    begin = time.process_time()
    for _ in range(count):
        key.sign(text, ec.ECDSA(hashes.SHA256()))
    return (time.process_time() - begin) * 1000 / count


def verification_ms(count: int) -> float:
    """Return the CPU milliseconds that it takes to verify an ES256 signature."""
    key, text = ec.generate_private_key(ec.SECP256R1()), os.urandom(600)
    signature, public = key.sign(text, ec.ECDSA(hashes.SHA256())), key.public_key()
    begin = time.process_time()
    for _ in range(count):
        public.verify(signature, text, ec.ECDSA(hashes.SHA256()))
    return (time.process_time() - begin) * 1000 / count


def one_by_one(front: Front, count: int) -> tuple[float, list[float]]:
    """Get tokens, one after the other. :returns: ms of CPU for one, and ms for each."""
    times, before = [], front.cpu_s()
    for _ in range(count):
        begin = time.perf_counter()
        front.token()
        times.append((time.perf_counter() - begin) * 1000)
    return (front.cpu_s() - before) * 1000 / count, times


def many_at_once(front: Front, seconds: float) -> tuple[float, list[float]]:
    """Let some clients get tokens side by side. :returns: tokens a second, and ms for each."""
    begin = time.perf_counter()

    def client(_: int) -> list[float]:
        times = []
        while (at := time.perf_counter()) < begin + seconds:
            front.token()
            times.append((time.perf_counter() - at) * 1000)
        return times

    with ThreadPoolExecutor(CLIENTS) as pool:
        times = [value for each in pool.map(client, range(CLIENTS)) for value in each]
    return len(times) / (time.perf_counter() - begin), times


def run(programs: Programs, rounds: int, scale: float) -> dict[str, object]:
    """Measure.

    :param scale: 1 for the figures that are published; less for a quick look.
    """
    more_files()
    where = machine()
    count = max(2, int(CONNECTIONS * scale))
    services: dict[str, dict[str, list[float]]]
    connections: dict[str, list[float]] = {WITHOUT: [], WITH: [], AGAIN: []}
    limit: dict[str, list[float]] = {
        "handshake_ms": [],
        "handshake_wall_ms": [],
        "signature_ms": [],
        "verification_ms": [],
    }
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        Path(folder).chmod(0o755)
        stage = Stage(Path(folder), programs)
        fronts: dict[str, Front] = {}
        say(f"starting {OURS}")
        app = stack.enter_context(TokenService(stage, Kind(OURS)))
        fronts[OURS] = stack.enter_context(Front(stage, app))
        say(f"starting {OIDC}")
        try:
            fronts[OIDC] = stack.enter_context(Front(stage, stack.enter_context(OidcProvider(stage, Kind(OIDC)))))
        except (OSError, WireError) as error:
            say(f"{OIDC} is left out: {error}")
            missing[OIDC] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        say("starting a gateway")
        gateway = stack.enter_context(Gateway(stage, app.keys()))
        server = stack.enter_context(Server(stage, Kind(OPENSSL)))
        for front in fronts.values():
            one_by_one(front, max(5, int(TOKENS * scale)))
        services = {name: {} for name in fronts}
        token = fronts[OURS].token()
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for name in random.sample(list(fronts), len(fronts)):
                found = services[name]
                cpu, times = one_by_one(fronts[name], max(5, int(TOKENS * scale)))
                found.setdefault("cpu_ms", []).append(cpu)
                found.setdefault("alone_ms", []).extend(times)
                per_s, times = many_at_once(fronts[name], LOADED_S * scale)
                found.setdefault("per_s", []).append(per_s)
                found.setdefault("busy_ms", []).extend(times)
            handshake = connects(server, max(10, int(HANDSHAKES * scale)))
            limit["handshake_ms"].append(handshake.cpu_ms)
            limit["handshake_wall_ms"].extend(handshake.walls_ms)
            limit["signature_ms"].append(signature_ms(SIGNATURES))
            for _ in range(TURNS):
                new = [fronts[OURS].token() for _ in range(count)]
                for name in random.sample(list(connections), len(connections)):
                    passwords = {WITHOUT: [], WITH: new, AGAIN: [token]}[name]
                    connections[name].append(connects(gateway, count, passwords=passwords).cpu_ms)
                limit["verification_ms"].append(verification_ms(SIGNATURES // TURNS))
        for name, front in fronts.items():
            services[name]["memory_mb"] = [front.memory_bytes() / 1e6]
        refused = token_is_looked_at(gateway, token)
    return {
        "rounds": rounds,
        "scale": scale,
        "machine": where,
        "services": services,
        "limit": limit,
        "turns": TURNS,
        "connections_in_turn": count,
        "connections": connections,
        "versions": {name: front.app.version() for name, front in fronts.items()},
        "token_bytes": len(token),
        "refused": refused,
        "missing": missing,
    }


def token_is_looked_at(gateway: Gateway, token: str) -> str:
    """Make sure that the broker checks what it is shown. :returns: how it refuses a token with a bad signature.

    :raises WireError: when it lets it in.
    """
    head, claims, signature = token.split(".")
    raw = bytearray(base64.urlsafe_b64decode(signature + "=="))
    raw[5] ^= 1
    false = f"{head}.{claims}.{base64.urlsafe_b64encode(raw).rstrip(b'=').decode()}"
    try:
        connects(gateway, 1, passwords=[false])
    except WireError as error:
        return str(error)
    raise WireError("the gateway takes a token with a false signature")


def main() -> int:
    """Measure and print JSON."""
    parser = programs_parser("Measure what tokens cost; prints JSON.")
    parser.set_defaults(rounds=20)
    arguments = parser.parse_args()
    json.dump(run(programs_of(arguments), arguments.rounds, arguments.scale), sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
