# SPDX-License-Identifier: Apache-2.0
"""Tokens as real providers sign them, against the blocks of docs/issuers.md: who is let in, who is kept out, and why.

The sharp edges are the providers': no `typ`, no `alg` in the keys, a key for encryption beside the others, names with
dots within a path, a scope that is one text, an audience that anybody can have, subjects that are no ids. And Python's
word about a token (`tests` of policy.yml) against what the broker does with one.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from bednet import compiled, store
from bednet.commands import checked_site
from bednet.issuers import TokenDevice, token_faults
from bednet.policy import Access
from bednet.site import decide
from tests.base64url import encode
from tests.plugin.gateway import Gateway, Site, broker_program, plugin_path
from tests.plugin.tokens import guest, one_more, shown
from tests.providers import documented, write_site
from tests.unit.store import sites

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bednet.site import Site as Checked
    from tests.plugin.pki import Authority
    from tests.providers import Json, Provider

OPTIONS = {"login_failures": "1000", "audit_rate": "1000"}
PEOPLE = "entra-people"
NAMES = tuple(documented())


@dataclass
class Plant:
    """A broker whose store has what the blocks say.

    :ivar site: as the check has read it.
    :ivar stated: the issuers in it.
    """

    gateway: Gateway
    folder: Path
    providers: dict[str, Provider] = field(default_factory=documented)
    stated: list[Json] = field(default_factory=list)
    site: Checked = field(init=False)

    def deploy(self, *providers: Provider) -> None:
        """Make the store what these blocks say, and fetch their keys; the broker runs on."""
        write_site(self.folder, *providers)
        self.site, self.stated = checked_site(self.folder), [provider.issuer for provider in providers]
        kept = store.Store(self.gateway.site.folder)
        kept.apply(list(compiled.lines(self.site)), sites.secrets())
        for provider in providers:
            if "jwks_url" in provider.issuer:
                kept.set_keys(provider.issuer["issuer"], {"keys": provider.keys})

    def of(self, name: str) -> Provider:
        """Return a provider whose block is in force, beside all others; two that are of one issuer take turns."""
        several = [other for key, other in self.providers.items() if key != ("entra" if name == PEOPLE else PEOPLE)]
        if self.stated != [other.issuer for other in several]:
            self.deploy(*several)
        return self.providers[name]

    def refuse(self, token: str, device: str, reason: str) -> None:
        """See that a token lets nobody in, and that the audit has the reason."""
        with one_more(self.gateway, event="refused", action="connect", reason=reason, device=device):
            self.gateway.refused(shown(token, device), on="plain", client_id=device)


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Plant]:
    """A broker for all of this file."""
    plugin_path()
    broker_program()
    folder = tmp_path_factory.mktemp("providers")
    (folder / "site").mkdir()
    site = Site(folder / "store")
    site.apply()
    with Gateway(folder, site, authority, options=OPTIONS, listeners=("plain",)) as gateway:
        yield Plant(gateway, folder / "site")


def topics_of(device: str) -> list[tuple[Access, str]]:
    """Return what is asked about each device: its own, others', and that of other roles."""
    publish = [f"sensors/{device}/t", "sensors/robot-9/t", f"lines/1/{device}/t", f"lines/2/{device}/t", "lines/1/x/t"]
    return [*((Access.PUBLISH, topic) for topic in publish), *((Access.SUBSCRIBE, t) for t in ("sensors/+/#", "#"))]


def described(provider: Provider) -> TokenDevice:
    said = provider.described
    return TokenDevice(said["issuer"], said["id"], tuple(said["roles"]), said.get("attributes", {}))


@pytest.mark.parametrize("name", NAMES)
def test_the_page_s_token_may_what_its_test_says(plant: Plant, name: str) -> None:
    """And whatever else is asked: Python decides about what the test describes, the broker about the token."""
    provider = plant.of(name)
    device = described(provider)
    answers = set()
    with guest(plant.gateway, provider.token(), device.id) as session:
        for access, topic in topics_of(device.id):
            if access is Access.PUBLISH:
                granted = session.publish(topic, b"1").granted
            else:
                granted = session.subscribe(topic)[0].granted
            assert granted is decide(plant.site, device, access, topic).allowed, (access, topic)
            answers.add(granted)
    assert answers == {True, False}


@pytest.mark.parametrize("name", NAMES)
def test_what_every_provider_is_refused_for(plant: Plant, name: str) -> None:
    provider = plant.of(name)
    device, leeway = provider.described["id"], provider.issuer.get("leeway", 30)
    longest = provider.issuer.get("longest", 86400)
    path = provider.issuer["roles"]["claim"]
    roles: Json = {claim: ... for claim in provider.claims if f"{path}.".startswith(f"{claim}.")}
    other_typ = "at+jwt" if provider.header.get("typ") != "at+jwt" else "JWT"
    refuse = plant.refuse
    refuse(provider.token(aud="https://graph.microsoft.com"), device, "token-audience")
    refuse(provider.token(aud=["account", "mqtt-brokers"]), device, "token-audience")
    refuse(provider.token(aud=...), device, "token-audience")
    for iss in (f"{provider.claims['iss']}/", provider.claims["iss"][:-1], "https://evil.example"):
        refuse(provider.token(iss=iss), device, "token-issuer")
    refuse(provider.token(header={"typ": other_typ}), device, "token-type")
    refuse(provider.token(header={"alg": "PS256"}), device, "token-algorithm")
    refuse(provider.token(header={"alg": "ES256"}), device, "token-algorithm")
    refuse(provider.token(iat=-leeway - 600, nbf=-leeway - 600, exp=-leeway), device, "token-expired")
    refuse(provider.token(iat=leeway + 60, exp=leeway + 120), device, "token-early")
    refuse(provider.token(iat=-1, exp=longest), device, "token-lifetime")
    refuse(provider.token(**roles), device, "token-claims")
    # Another key than it says, one that is not for signatures or that nobody published, and none.
    refuse(provider.token(key=1), device, "token-signature")
    refuse(provider.token(key=1, header={"kid": "enc-1"}), device, "token-key")
    refuse(provider.token(header={"kid": "new"}), device, "token-key")
    text = ".".join(provider.token().split(".")[:2])
    refuse(f"{text}.{encode(bytes(256))}", device, "token-signature")
    # The same, a second earlier: what was refused was refused for that.
    plant.gateway.admitted(
        shown(provider.token(iat=-leeway - 600, nbf=-leeway - 600, exp=-leeway + 5), device),
        on="plain",
        client_id=device,
    )


CLAIMS: list[tuple[str, Json, str]] = [
    # Keycloak: a role of the realm, or of another client; a value that reaches into other topics, or is no text
    ("keycloak", {"resource_access": {"account": {"roles": ["plant-robot"]}}}, "token-claims"),
    ("keycloak", {"resource_access": {}, "realm_access": {"roles": ["plant-robot"]}}, "token-claims"),
    ("keycloak", {"resource_access": {"mqtt-broker": {"roles": ["plant-robots", "plant"]}}}, "token-claims"),
    ("keycloak", {"resource_access": {"mqtt-broker.roles": {"roles": ["plant-robot"]}}}, "token-claims"),
    ("keycloak", {"plant_line": ...}, "token-claims"),
    ("keycloak", {"plant_line": "1/#"}, "token-claims"),
    ("keycloak", {"plant_line": 1}, "token-claims"),
    ("keycloak", {"azp": "robot.7"}, "token-claims"),
    ("keycloak", {"aud": "account"}, "token-audience"),
    # Entra ID: another tenant, a v1.0 token, an application without a role, a person's scope
    ("entra", {"iss": "https://login.microsoftonline.com/9188040d-6c67-4c5b-b112-36a304b66dad/v2.0"}, "token-issuer"),
    ("entra", {"iss": "https://sts.windows.net/7a1f3c52-08d4-4e6b-9b1d-5c2e8f90a3b4/"}, "token-issuer"),
    ("entra", {"aud": "api://c0ffee00-1234-4abc-8def-0123456789ab"}, "token-audience"),
    ("entra", {"azp": ..., "appid": "5f0e1d2c-3b4a-4958-8776-655443322110"}, "token-claims"),
    ("entra", {"roles": ..., "scp": "Plant.Sensor"}, "token-claims"),
    ("entra", {"roles": "Other Plant.Sensor"}, "token-claims"),
    (PEOPLE, {"scp": "Alarms.Read Plant.Viewer"}, "token-claims"),
    (PEOPLE, {"scp": "Alarms.Read,Plant.View"}, "token-claims"),
    (PEOPLE, {"scp": ["Alarms.Read Plant.View"]}, "token-claims"),
    (PEOPLE, {"scp": ..., "roles": ["Plant.View"]}, "token-claims"),
    # Auth0: its own profile, no permission, an issuer without its slash
    ("auth0", {"client_id": ..., "azp": "Xk3mPq7RtXw2Yb9Lc4Nd8Vf1Hg6Js0Ae"}, "token-claims"),
    ("auth0", {"permissions": []}, "token-claims"),
    ("auth0", {"permissions": ["publish:sensor"]}, "token-claims"),
    ("auth0", {"iss": "https://plant.eu.auth0.com"}, "token-issuer"),
    ("auth0", {"iss": "https://other.eu.auth0.com/"}, "token-issuer"),
    ("auth0", {"aud": "https://plant.eu.auth0.com/userinfo"}, "token-audience"),
    # Kubernetes: another namespace, the token for the API server, a name with a dot, a name that hides the others
    ("kubernetes", {"kubernetes.io": {"namespace": "other", "serviceaccount": {"name": "robot-7"}}}, "token-claims"),
    ("kubernetes", {"kubernetes.io": {"namespace": "plant-edge", "serviceaccount": {"name": "a.b"}}}, "token-claims"),
    ("kubernetes", {"kubernetes.io": {"namespace": "plant-edge"}}, "token-claims"),
    ("kubernetes", {"kubernetes.io.serviceaccount": {"uid": "1"}}, "token-claims"),
    ("kubernetes", {"aud": ["https://kubernetes.default.svc.cluster.local"]}, "token-audience"),
    # Google: another customer's project, with our audience; no machine at all
    (
        "google",
        {"google": {"compute_engine": {"instance_id": "1888435224091805695", "project_id": "evil-1"}}},
        "token-claims",
    ),
    ("google", {"google": ...}, "token-claims"),
    ("google", {"google": {"compute_engine": {"instance_id": 1888, "project_id": "plant-4711"}}}, "token-claims"),
    ("google", {"google.compute_engine": {"project_id": "plant-4711"}}, "token-claims"),
]


@pytest.mark.parametrize(("name", "claims", "reason"), CLAIMS)
def test_what_a_provider_s_own_tokens_are_refused_for(plant: Plant, name: str, claims: Json, reason: str) -> None:
    provider = plant.of(name)
    plant.refuse(provider.token(**claims), provider.described["id"], reason)


@pytest.mark.parametrize(
    ("name", "claims"),
    [
        ("keycloak", {"aud": "mqtt-broker"}),
        ("keycloak", {"resource_access": {"mqtt-broker": {"roles": ["other", "plant-view", "plant-robot"]}}}),
        ("auth0", {"aud": ["https://mqtt.plant.example", "https://plant.eu.auth0.com/userinfo"]}),
        (PEOPLE, {"scp": "Plant.View"}),
        (PEOPLE, {"scp": "Plant.View Alarms.Read"}),
        ("kubernetes", {"aud": ["other", "mqtt-broker"]}),
        # The longest name wins, though the other leads somewhere as well.
        ("kubernetes", {"kubernetes": {"io": {"serviceaccount": {"name": "root"}, "namespace": "other"}}}),
    ],
)
def test_other_forms_of_the_same_are_good(plant: Plant, name: str, claims: Json) -> None:
    provider = plant.of(name)
    device = provider.described["id"]
    plant.gateway.admitted(shown(provider.token(**claims), device), on="plain", client_id=device)


def test_clients_with_dots_in_their_names_are_found(plant: Plant) -> None:
    """The page's path for them, `resource_access.mqtt.plant.example.roles`."""
    other = copy.deepcopy(plant.providers["keycloak"])
    other.issuer["roles"]["claim"] = "resource_access.mqtt.plant.example.roles"
    plant.deploy(other)
    device = other.described["id"]
    good = {"mqtt.plant.example": {"roles": ["plant-robot"]}, "mqtt": {"roles": ["plant-view"]}}
    plant.gateway.admitted(shown(other.token(resource_access=good), device), on="plain", client_id=device)
    for bad in ({"mqtt.plant": {"roles": ["plant-robot"]}}, {"mqtt": good["mqtt.plant.example"]}, {"mqtt.plant": good}):
        plant.refuse(other.token(resource_access=bad), device, "token-claims")


@pytest.mark.parametrize(
    ("name", "claim", "subject"),
    [
        ("kubernetes", "sub", "system:serviceaccount:plant-edge:robot-7"),
        ("auth0", "sub", "Xk3mPq7RtXw2Yb9Lc4Nd8Vf1Hg6Js0Ae@clients"),
        ("google", "email", "411143357921-compute@developer.gserviceaccount.com"),
        ("google", "sub", "spiffe://plant.example/robot-7"),
        ("keycloak", "azp", "robot.7"),
    ],
)
def test_many_subjects_are_no_ids(plant: Plant, name: str, claim: str, subject: str) -> None:
    """The page's table of them."""
    other = copy.deepcopy(plant.providers[name])
    other.issuer["device"]["claim"] = claim
    other.block["tests"] = []
    plant.deploy(other)
    bad: Json = {claim: subject}
    plant.refuse(other.token(**bad), "whoever", "token-claims")
    # A sound one in its place is fine.
    device = other.issuer["device"]["prefix"] + "robot-7"
    plant.gateway.admitted(shown(other.token(**{**bad, claim: "robot-7"}), device), on="plain", client_id=device)


@pytest.mark.parametrize("name", NAMES)
def test_with_the_default_types_their_tokens_are_refused(plant: Plant, name: str) -> None:
    """All but Auth0's, whose profile RFC 9068 is the default's."""
    other = copy.deepcopy(plant.providers[name])
    del other.issuer["typ"]
    plant.deploy(other)
    device = other.described["id"]
    if name == "auth0":
        plant.gateway.admitted(shown(other.token(), device), on="plain", client_id=device)
    else:
        plant.refuse(other.token(), device, "token-type")


@pytest.mark.parametrize(
    ("roles", "line"),
    [
        (["plant-robot"], "1"),
        (["plant-view"], ...),
        (["plant-robot"], ...),
        (["plant-robot"], ""),
        (["plant-robot"], "1/2"),
        (["plant-robot"], "+"),
        (["plant-robot"], "$1"),
        (["plant-robot"], "l" * 255),
        (["plant-robot"], "l" * 256),
        ([], "1"),
    ],
)
def test_a_test_is_refused_where_its_token_would_be(plant: Plant, roles: list[str], line: Any) -> None:
    """:func:`token_faults` and the plugin say the same of what a token says."""
    provider = plant.of("keycloak")
    mapped = tuple(provider.issuer["roles"]["map"][role] for role in roles)
    device = TokenDevice("keycloak", "kc-robot-7", mapped, {} if line is ... else {"line": line})
    faults = list(token_faults(device, plant.site.issuers, plant.site.role_profiles))
    token = provider.token(resource_access={"mqtt-broker": {"roles": roles}}, plant_line=line)
    if faults:
        plant.refuse(token, "kc-robot-7", "token-claims")
    else:
        plant.gateway.admitted(shown(token, "kc-robot-7"), on="plain", client_id="kc-robot-7")


def test_all_of_a_device_s_tokens_can_be_ended(plant: Plant) -> None:
    """The page's command for it, which needs nothing of the provider."""
    provider = plant.of("google")
    device, token = provider.described["id"], provider.token()
    gateway = plant.gateway
    with one_more(gateway, event="disconnected", device=device, reason="token-revoked"), guest(gateway, token, device):
        store.Store(gateway.site.folder).cutoff(device, int(time.time()))
        gateway.wait(lambda: gateway.count(event="disconnected", device=device), "the end of the session")
    plant.refuse(token, device, "token-revoked")
    later = provider.token(iat=1, exp=60)
    gateway.admitted(shown(later, device), on="plain", client_id=device)
