# SPDX-License-Identifier: Apache-2.0
"""RFC 7662 and RFC 7009: who may look at a token and end it; and the list that brokers fetch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from bednet.token_service import jose, keys, revocation
from bednet.token_service.app import make_app
from bednet.token_service.database import cutoffs, tokens
from tests.token_service.conftest import settings_of
from tests.token_service.plant import (
    DEVICES,
    ISSUER,
    START,
    certificate,
    claims_of,
    compiled,
    refused,
)

if TYPE_CHECKING:
    from werkzeug.test import TestResponse

    from tests.token_service.plant import Plant

INACTIVE = {"active": False}


def text_of(response: TestResponse) -> str:
    assert response.status_code == 200
    return str((response.json or {})["access_token"])


def ask(plant: Plant, path: str, token: str, who: str = "edge-1", **form: str) -> TestResponse:
    plant.sent.append(token)
    return plant.post(path, {"client_id": who, "token": token, **form}, certificate=plant.certificate(who))


def listed(plant: Plant) -> dict[str, Any]:
    """Fetch the revocation list, and verify it as a broker does."""
    response = plant.get("/revocations")
    assert response.status_code == 200
    assert response.mimetype == "application/jwt"
    parsed = jose.parse(response.get_data(as_text=True))
    assert parsed.header["typ"] == "revocations+jwt"
    with plant.database.reading() as connection:
        jose.verify(parsed, keys.public_keys(connection, plant.clock.now)[parsed.header["kid"]], ["ES256"])
    return parsed.claims


# Introspection


def test_device_sees_its_own_token_section_2_2(plant: Plant) -> None:
    response = plant.token()
    found = ask(plant, "/introspect", text_of(response)).json
    assert found == {"active": True, "token_type": "Bearer", **claims_of(response)}


def test_introspector_sees_every_token(plant: Plant) -> None:
    assert (ask(plant, "/introspect", text_of(plant.token()), "watcher").json or {})["sub"] == "edge-1"
    pop = ask(plant, "/introspect", text_of(plant.token_by_assertion()), "watcher").json or {}
    assert (pop["sub"], pop["token_type"]) == ("pump-1", "PoP")


def test_token_of_another_looks_like_none_section_2_2(plant: Plant) -> None:
    token = text_of(plant.token("edge-2"))
    assert ask(plant, "/introspect", token).json == INACTIVE
    assert plant.reason() == "not-your-token"


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ("boss", "wrong-method"),
        ("temp-101", "unknown-client"),
        ("stranger", "unknown-client"),
        ("meter-1", "wrong-method"),
    ],
)
def test_who_is_neither_device_nor_introspector_is_refused_section_2_1(plant: Plant, who: str, reason: str) -> None:
    response = ask(plant, "/introspect", text_of(plant.token()), who)
    refused(plant, response, "invalid_client", reason, 401)


@pytest.mark.parametrize("path", ["/introspect", "/revoke"])
@pytest.mark.parametrize("named", [{}, {"client_id": "meter-1"}])
def test_without_authentication_nobody_is_told_anything_section_2_1(
    plant: Plant, path: str, named: dict[str, str]
) -> None:
    """Nor who names a device that may begin with its name alone elsewhere (RFC 8628, 3.1)."""
    response = plant.post(path, {"token": text_of(plant.token_by_secret()), **named})
    refused(plant, response, "invalid_client", "no-authentication", 401)
    assert listed(plant)["tokens"] == []


def test_revoked_introspector_is_refused(plant: Plant) -> None:
    plant.apply(revoked_serials={"ABC": "keyCompromise"})
    form = {"client_id": "watcher", "token": "x"}
    response = plant.post("/introspect", form, certificate=certificate("watcher", 0xABC))
    refused(plant, response, "invalid_client", "certificate-revoked", 401)


def test_introspector_gets_no_token(plant: Plant) -> None:
    refused(plant, plant.token("watcher"), "invalid_client", "wrong-method", 401)


@pytest.mark.parametrize("path", ["/introspect", "/revoke"])
def test_device_that_is_out_of_service_is_told_nothing_and_ends_nothing(plant: Plant, path: str) -> None:
    rows = [{**row, "revoked": "superseded"} if row["device"] == "edge-1" else row for row in DEVICES]
    tokens_of = {device: text_of(plant.token(device)) for device in ("edge-1", "ends-1")}
    plant.apply(compiled(rows))
    plant.clock.now = START + 100
    for device, reason in (("edge-1", "revoked"), ("ends-1", "until")):
        refused(plant, ask(plant, path, tokens_of[device], device), "invalid_client", reason, 401)
    assert listed(plant)["tokens"] == []


def test_token_is_active_to_the_last_second(plant: Plant) -> None:
    token = text_of(plant.token())
    plant.clock.now = START + 899
    assert (ask(plant, "/introspect", token).json or {})["active"] is True
    plant.clock.now = START + 900
    assert ask(plant, "/introspect", token).json == INACTIVE


def test_token_of_a_key_that_is_gone_is_inactive(plant: Plant) -> None:
    token = text_of(plant.token())
    plant.rotate(sign_after=0, retire_after=0)
    assert ask(plant, "/introspect", token).json == INACTIVE


@pytest.mark.parametrize("token", ["x", "a.b.c", "x" * 9000, "é", "..", "e30.e30."])
def test_what_is_no_token_is_inactive(plant: Plant, token: str) -> None:
    assert ask(plant, "/introspect", token).json == INACTIVE


def test_token_that_was_changed_is_inactive(plant: Plant) -> None:
    header, claims, signature = text_of(plant.token()).split(".")
    other = text_of(plant.token()).split(".")[1]
    assert ask(plant, "/introspect", f"{header}.{other}.{signature}").json == INACTIVE
    assert ask(plant, "/introspect", f"{header}.{claims}.{signature}").json != INACTIVE


def test_token_that_was_issued_under_another_name_of_the_service_is_inactive(plant: Plant) -> None:
    token = text_of(plant.token())
    renamed = settings_of(plant.log.parent, issuer="https://other.plant.example")
    form = {"client_id": "edge-1", "token": token}
    there = make_app(renamed, database=plant.database, now=plant.clock)
    assert plant.post("/introspect", form, certificate=plant.certificate("edge-1"), app=there).json == INACTIVE


def test_revocation_list_is_no_access_token(plant: Plant) -> None:
    assert ask(plant, "/introspect", plant.get("/revocations").get_data(as_text=True)).json == INACTIVE


def test_token_that_is_signed_but_was_never_recorded_is_inactive(plant: Plant) -> None:
    token = text_of(plant.token())
    with plant.database.writing() as connection:
        connection.execute(tokens.delete())
    assert ask(plant, "/introspect", token).json == INACTIVE


@pytest.mark.parametrize("path", ["/introspect", "/revoke"])
def test_token_is_required(plant: Plant, path: str) -> None:
    response = plant.post(path, {"client_id": "edge-1"}, certificate=plant.certificate("edge-1"))
    refused(plant, response, "invalid_request", "no-token")


@pytest.mark.parametrize("hint", ["access_token", "refresh_token", "id_token"])
def test_hint_changes_nothing_section_2_1_of_rfc_7009(plant: Plant, hint: str) -> None:
    token = text_of(plant.token())
    assert (ask(plant, "/introspect", token, token_type_hint=hint).json or {})["active"] is True
    assert ask(plant, "/revoke", token, token_type_hint=hint).status_code == 200
    assert ask(plant, "/introspect", token, token_type_hint=hint).json == INACTIVE


# Revocation


def test_device_ends_its_own_token_rfc_7009_section_2_1(plant: Plant) -> None:
    response = plant.token()
    jti = claims_of(response)["jti"]
    assert ask(plant, "/revoke", text_of(response)).status_code == 200
    assert listed(plant)["tokens"] == [{"jti": jti, "exp": START + 900, "device": "edge-1"}]
    assert plant.lines()[-1] | {"event": "revoked", "jti": jti} == plant.lines()[-1]


def test_other_token_of_the_device_goes_on(plant: Plant) -> None:
    first, second = plant.token(), plant.token()
    ask(plant, "/revoke", text_of(first))
    assert (ask(plant, "/introspect", text_of(second)).json or {})["active"] is True


def test_ending_twice_is_fine_section_2_2(plant: Plant) -> None:
    token = text_of(plant.token())
    assert [ask(plant, "/revoke", token).status_code for _ in range(2)] == [200, 200]


@pytest.mark.parametrize("who", ["edge-2"])
def test_token_of_another_is_not_ended_section_2_1(plant: Plant, who: str) -> None:
    token = text_of(plant.token())
    refused(plant, ask(plant, "/revoke", token, who), "invalid_grant", "not-your-token")
    assert listed(plant)["tokens"] == []


def test_introspector_may_not_end_tokens(plant: Plant) -> None:
    refused(plant, ask(plant, "/revoke", text_of(plant.token()), "watcher"), "invalid_client", "wrong-method", 401)


@pytest.mark.parametrize("token", ["x", "a.b.c", "x" * 9000])
def test_what_is_no_token_is_fine_section_2_2(plant: Plant, token: str) -> None:
    assert ask(plant, "/revoke", token).status_code == 200


def give_back(plant: Plant, number: int, who: str = "edge-1") -> None:
    """Let a device get tokens and end them, one after the other."""
    for _ in range(number):
        assert ask(plant, "/revoke", text_of(plant.token(who)), who).status_code == 200


def test_device_that_gives_back_too_many_ends_all_of_its_own(plant: Plant) -> None:
    kept, others = text_of(plant.token()), text_of(plant.token("edge-2"))
    give_back(plant, revocation.MOST_OWN)
    assert (len(listed(plant)["tokens"]), listed(plant)["cutoffs"]) == (revocation.MOST_OWN, {})
    assert (ask(plant, "/introspect", kept).json or {})["active"] is True
    plant.clock.now += 1
    give_back(plant, 1)
    assert (listed(plant)["tokens"], listed(plant)["cutoffs"]) == ([], {"edge-1": START + 1})
    line = plant.lines()[-1]
    assert (line["event"], line["client"], line["cutoff"]) == ("revoked-all", "edge-1", START + 1)
    assert ask(plant, "/introspect", kept).json == INACTIVE
    # Nobody else's is touched, and the device goes on with a new one, in that very second.
    assert (ask(plant, "/introspect", others, "edge-2").json or {})["active"] is True
    response = plant.token()
    assert claims_of(response)["iat"] == START + 2
    assert (ask(plant, "/introspect", text_of(response)).json or {})["active"] is True


def test_list_stays_short_whatever_a_device_gives_back(plant: Plant) -> None:
    others = text_of(plant.token("edge-2"))
    longest = 0
    for _ in range(6):
        give_back(plant, revocation.MOST_OWN - 2)
        longest = max(longest, len(plant.get("/revocations").get_data()))
        plant.clock.now += 1
    # 180 tokens of 200 bytes are no more than twice as many as may be listed by themselves.
    assert longest < 2 * revocation.MOST_OWN * 200
    assert len(listed(plant)["tokens"]) <= revocation.MOST_OWN
    assert list(listed(plant)["cutoffs"]) == ["edge-1"]
    assert (ask(plant, "/introspect", others, "edge-2").json or {})["active"] is True


def test_cutoff_of_a_device_in_a_hurry_does_not_run_ahead_of_the_clock(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocation, "MOST_OWN", 4)
    # Its tokens would have times of the future, and behind these the service would take its own clock to be wrong.
    give_back(plant, 5 * revocation.MOST_OWN)
    assert listed(plant)["cutoffs"] == {"edge-1": START}
    response = plant.token()
    assert claims_of(response)["iat"] == START + 1
    assert (ask(plant, "/introspect", text_of(response)).json or {})["active"] is True
    plant.clock.now += 1
    give_back(plant, 1)
    assert (listed(plant)["tokens"], listed(plant)["cutoffs"]) == ([], {"edge-1": START + 1})


@pytest.mark.parametrize("ahead", [0, 20])
def test_cutoff_is_not_taken_back_by_an_instance_whose_clock_is_behind(
    plant: Plant, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocation, "MOST_OWN", 4)
    with plant.database.writing() as connection:
        revocation.revoke_device(plant.database, connection, "edge-1", START + ahead)
    give_back(plant, 3 * revocation.MOST_OWN)
    assert listed(plant)["cutoffs"] == {"edge-1": START + ahead}
    assert "revoked-all" not in {line["event"] for line in plant.lines()}


@pytest.mark.parametrize(("later", "cut"), [(900 + 299, True), (900 + 300, False)])
def test_tokens_that_are_over_in_any_case_do_not_count(plant: Plant, later: int, cut: bool) -> None:
    give_back(plant, revocation.MOST_OWN)
    plant.clock.now = START + later
    give_back(plant, 1)
    assert ("edge-1" in listed(plant)["cutoffs"]) is cut


def test_same_token_given_back_again_counts_once(plant: Plant) -> None:
    kept, token = text_of(plant.token()), text_of(plant.token())
    for _ in range(2 * revocation.MOST_OWN):
        ask(plant, "/revoke", token)
    assert (len(listed(plant)["tokens"]), listed(plant)["cutoffs"]) == (1, {})
    assert (ask(plant, "/introspect", kept).json or {})["active"] is True


# The list


def test_list_is_that_of_the_contract(plant: Plant) -> None:
    assert listed(plant) == {"iss": ISSUER, "iat": START, "exp": START + 3600, "tokens": [], "cutoffs": {}}


def test_list_has_a_token_until_leeway_is_over(plant: Plant) -> None:
    ask(plant, "/revoke", text_of(plant.token()))
    for now, number in ((START + 900 + 299, 1), (START + 900 + 300, 0)):
        plant.clock.now = now
        assert len(listed(plant)["tokens"]) == number


def test_list_shows_a_revocation_at_once(plant: Plant) -> None:
    assert listed(plant)["tokens"] == []
    ask(plant, "/revoke", text_of(plant.token()))
    assert len(listed(plant)["tokens"]) == 1


def test_unchanged_list_is_signed_once_in_a_minute(plant: Plant) -> None:
    first = plant.get("/revocations").get_data()
    plant.clock.now = START + 59
    assert plant.get("/revocations").get_data() == first
    plant.clock.now = START + 60
    assert plant.get("/revocations").get_data() != first


def test_list_is_signed_anew_when_its_key_is_given_up_7515_4_1_4(plant: Plant) -> None:
    """After a key was stolen gateways take no list that the old one signed, not for the rest of its minute either."""
    first = plant.get("/revocations").get_data(as_text=True)
    new = plant.rotate(sign_after=0, retire_after=0)["kid"]
    again = plant.get("/revocations").get_data(as_text=True)
    assert [key["kid"] for key in json.loads(plant.get("/jwks.json").get_data())["keys"]] == [new]
    assert jose.parse(again).header["kid"] == new != jose.parse(first).header["kid"]


def test_device_that_is_revoked_in_the_site_gets_a_cutoff(plant: Plant) -> None:
    token = text_of(plant.token())
    rows = [{**row, "revoked": "superseded"} if row["device"] == "edge-1" else row for row in DEVICES]
    plant.clock.now = START + 10
    assert plant.apply(compiled(rows))["revoked"] == ["edge-1"]
    assert listed(plant)["cutoffs"] == {"edge-1": START + 10}
    assert ask(plant, "/introspect", token, "watcher").json == INACTIVE
    refused(plant, plant.token(), "invalid_client", "revoked", 401)


def test_device_that_comes_back_gets_tokens_that_hold(plant: Plant) -> None:
    rows = [{**row, "revoked": "superseded"} if row["device"] == "edge-1" else row for row in DEVICES]
    old = text_of(plant.token())
    plant.apply(compiled(rows))
    back = [{**row, "reinstated": START} if row["device"] == "edge-1" else row for row in DEVICES]
    assert plant.apply(compiled(back))["reinstated"] == [{"device": "edge-1", "reason": "superseded"}]
    response = plant.token()
    # In the very second of the cutoff: the broker refuses iat <= cutoff.
    assert claims_of(response)["iat"] == START + 1
    assert (ask(plant, "/introspect", text_of(response)).json or {})["active"] is True
    assert ask(plant, "/introspect", old).json == INACTIVE


def test_device_that_leaves_the_site_gets_a_cutoff(plant: Plant) -> None:
    plant.token()
    assert plant.apply(compiled([row for row in DEVICES if row["device"] != "edge-1"]))["removed"] == 1
    assert listed(plant)["cutoffs"] == {"edge-1": START}
    refused(plant, plant.token(), "invalid_client", "unknown-client", 401)


def test_cutoff_of_a_device_holds_for_a_day(plant: Plant) -> None:
    plant.apply(compiled([row for row in DEVICES if row["device"] != "edge-1"]))
    for now, there in ((START + 86_400 + 299, True), (START + 86_400 + 300, False)):
        plant.clock.now = now
        assert ("edge-1" in listed(plant)["cutoffs"]) is there


def test_purge_forgets_only_what_is_over(plant: Plant) -> None:
    ask(plant, "/revoke", text_of(plant.token()))
    plant.token("edge-2")
    with plant.database.writing() as connection:
        revocation.revoke_device(plant.database, connection, "meter-1", START)
        assert revocation.purge(connection, START + 900 + 299) == 0
        # The newest tokens stay, as the clock is known by them.
        assert revocation.purge(connection, START + 900 + 300) == 0
    plant.clock.now = START + 1
    plant.token("edge-2")
    with plant.database.writing() as connection:
        assert revocation.purge(connection, START + 901 + 300) == 2
        assert connection.execute(sa.select(sa.func.count()).select_from(cutoffs)).scalar() == 1
        assert revocation.purge(connection, START + 86_400 + 300) == 1
        assert connection.execute(sa.select(sa.func.count()).select_from(tokens)).scalar() == 1
