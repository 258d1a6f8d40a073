# SPDX-License-Identifier: Apache-2.0
"""RFC 8628: a human lets a device in; the page on which that happens, and what would be done to it."""

from __future__ import annotations

import contextlib
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from bednet.token_service import onboarding
from bednet.token_service.database import Database, device_requests, meta
from bednet.token_service.migrations import upgrade
from tests.token_service.plant import (
    DEVICES,
    GATEWAY,
    ISSUER,
    SECRETS,
    START,
    basic,
    certificate,
    claims_of,
    compiled,
    refused,
    scope_of,
    scope_text,
)

if TYPE_CHECKING:
    from pathlib import Path

    from werkzeug.test import TestResponse

    from tests.token_service.plant import Plant

GRANT = "urn:ietf:params:oauth:grant-type:device_code"


def ask(plant: Plant, device: str = "meter-1", **form: Any) -> dict[str, Any]:
    """Let a device ask. :returns: its answer."""
    response = plant.post("/device_authorization", {"client_id": device, **form})
    assert response.status_code == 200, response.get_data(as_text=True)
    found: dict[str, Any] = response.json or {}
    plant.sent.extend((found["device_code"], found["user_code"], found["user_code"].replace("-", "")))
    return found


def poll(plant: Plant, device_code: str, device: str = "meter-1", **arguments: Any) -> TestResponse:
    form = {"grant_type": GRANT, "device_code": device_code, "client_id": device, **arguments.pop("form", {})}
    return plant.post("/token", form, **arguments)


def csrf(plant: Plant, who: str = "boss") -> str:
    page = plant.get("/device", certificate=plant.certificate(who))
    assert page.status_code == 200
    found = re.search(r'name="csrf" value="([^"]+)"', page.get_data(as_text=True))
    assert found
    return found[1]


def submit(plant: Plant, action: str, user_code: str, device: str = "meter-1", **arguments: Any) -> TestResponse:
    form = {
        "csrf": csrf(plant),
        "action": action,
        "user_code": user_code,
        "device": device,
        **arguments.pop("form", {}),
    }
    return plant.post("/device", form, certificate=arguments.pop("certificate", plant.certificate("boss")), **arguments)


def test_answer_is_that_of_section_3_2(plant: Plant) -> None:
    found = ask(plant)
    assert found == {
        "device_code": found["device_code"],
        "user_code": found["user_code"],
        "verification_uri": f"{ISSUER}/device",
        "verification_uri_complete": f"{ISSUER}/device?user_code={found['user_code']}",
        "expires_in": 600,
        "interval": 5,
    }
    assert re.fullmatch(r"[BCDFGHJKLMNPQRSTVWXZ]{4}-[BCDFGHJKLMNPQRSTVWXZ]{4}", found["user_code"])
    assert len(found["device_code"]) == 43


def test_device_gets_its_token_when_a_human_has_approved_it(plant: Plant) -> None:
    asked = ask(plant, scope=scope_text(["sensors/hall-1/meter-1/#", ["pub"]]))
    refused_as_pending(plant, asked)
    assert "meter-1 was approved" in submit(plant, "approve", asked["user_code"]).get_data(as_text=True)
    plant.clock.now += 5
    response = poll(plant, asked["device_code"])
    claims = claims_of(response)
    assert (claims["sub"], scope_of(claims["scope"])) == ("meter-1", [["sensors/hall-1/meter-1/#", ["pub"]]])
    assert plant.lines()[-1] | {"event": "issued", "approver": "boss"} == plant.lines()[-1]


def refused_as_pending(plant: Plant, asked: dict[str, Any]) -> None:
    response = poll(plant, asked["device_code"])
    assert (response.status_code, (response.json or {})["error"]) == (400, "authorization_pending")


def test_device_code_gives_one_token(plant: Plant) -> None:
    asked = ask(plant)
    submit(plant, "approve", asked["user_code"])
    assert poll(plant, asked["device_code"]).status_code == 200
    refused(plant, poll(plant, asked["device_code"]), "invalid_grant", "device-code-unknown")


def test_denied_device_is_told_section_3_5(plant: Plant) -> None:
    asked = ask(plant)
    assert "was denied" in submit(plant, "deny", asked["user_code"]).get_data(as_text=True)
    refused(plant, poll(plant, asked["device_code"]), "access_denied", "access-denied")


def test_codes_end_at_the_second_section_3_5(plant: Plant) -> None:
    asked = ask(plant)
    plant.clock.now = START + 599
    refused_as_pending(plant, asked)
    assert submit(plant, "look", asked["user_code"]).status_code == 200
    plant.clock.now = START + 600
    refused(plant, poll(plant, asked["device_code"]), "expired_token", "expired-token")
    assert submit(plant, "approve", asked["user_code"]).status_code == 400
    assert plant.reason() == "user-code-unknown"


def test_device_that_polls_too_fast_waits_five_seconds_longer_section_3_5(plant: Plant) -> None:
    asked = ask(plant)
    answers = []
    for second in (0, 4, 14, 23, 38):
        plant.clock.now = START + second
        answers.append((poll(plant, asked["device_code"]).json or {})["error"])
    pending, slow = "authorization_pending", "slow_down"
    assert answers == [pending, slow, pending, slow, pending]


def test_approval_does_not_wait_for_the_interval(plant: Plant) -> None:
    asked = ask(plant)
    refused_as_pending(plant, asked)
    submit(plant, "approve", asked["user_code"])
    assert poll(plant, asked["device_code"]).status_code == 200


@pytest.mark.parametrize("code", ["x", "", "x" * 43])
def test_unknown_device_code_is_refused(plant: Plant, code: str) -> None:
    response = poll(plant, code)
    assert response.status_code == 400
    assert (response.json or {})["error"] == ("invalid_grant" if code else "invalid_request")


def test_device_code_of_another_device_is_refused_section_5_2(plant: Plant) -> None:
    asked = ask(plant)
    submit(plant, "approve", asked["user_code"])
    form = {"client_id": "edge-1"}
    response = poll(plant, asked["device_code"], form=form, certificate=plant.certificate("edge-1"))
    refused(plant, response, "invalid_grant", "device-code-of-another")


def test_user_code_is_no_device_code(plant: Plant) -> None:
    asked = ask(plant)
    submit(plant, "approve", asked["user_code"])
    refused(plant, poll(plant, asked["user_code"]), "invalid_grant", "device-code-unknown")


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("edge-1", "wrong-method"),
        ("pump-1", "wrong-method"),
        ("temp-101", "unknown-client"),
        ("stranger", "unknown-client"),
    ],
)
def test_device_with_a_key_of_its_own_must_prove_it_section_3_1(plant: Plant, device: str, reason: str) -> None:
    response = plant.post("/device_authorization", {"client_id": device})
    refused(plant, response, "invalid_client", reason, 401)


def test_device_with_a_certificate_asks_with_it(plant: Plant) -> None:
    mine = plant.certificate("edge-1")
    response = plant.post("/device_authorization", {"client_id": "edge-1"}, certificate=mine)
    asked = response.json or {}
    plant.sent.append(asked["device_code"])
    submit(plant, "approve", asked["user_code"], "edge-1")
    refused(plant, poll(plant, asked["device_code"], "edge-1"), "invalid_client", "wrong-method", 401)
    assert "cnf" in claims_of(poll(plant, asked["device_code"], "edge-1", certificate=mine))


def test_name_alone_is_for_this_grant_only(plant: Plant) -> None:
    response = plant.post("/token", {"grant_type": "client_credentials", "client_id": "meter-1"})
    refused(plant, response, "invalid_client", "no-authentication", 401)


def test_wrong_secret_is_refused_though_none_is_needed(plant: Plant) -> None:
    response = plant.post("/device_authorization", {"client_id": "meter-1"}, authorization=basic("meter-1", "wrong"))
    refused(plant, response, "invalid_client", "wrong-secret", 401)
    right = basic("meter-1", SECRETS["meter-1"])
    assert plant.post("/device_authorization", {"client_id": "meter-1"}, authorization=right).status_code == 200


def test_malformed_scope_is_refused_before_anybody_is_asked(plant: Plant) -> None:
    response = plant.post("/device_authorization", {"client_id": "meter-1", "scope": "x"})
    refused(plant, response, "invalid_scope", "scope-malformed")
    response = plant.post("/device_authorization", {"client_id": "meter-1", "resource": "mqtts://other.example"})
    refused(plant, response, "invalid_target", "unknown-resource")


def test_resource_is_named_with_the_device_code(plant: Plant) -> None:
    asked = ask(plant)
    submit(plant, "approve", asked["user_code"])
    response = poll(plant, asked["device_code"], form={"resource": "mqtts://other.example"})
    refused(plant, response, "invalid_target", "unknown-resource")
    assert claims_of(poll(plant, asked["device_code"], form={"resource": GATEWAY}))["aud"] == GATEWAY


def test_fourth_open_request_of_a_device_from_one_address_is_refused_section_5_1(plant: Plant) -> None:
    for _ in range(3):
        ask(plant)
    response = plant.post("/device_authorization", {"client_id": "meter-1"})
    refused(plant, response, "slow_down", "too-many-requests", 429)
    # Whoever it was: the device itself, which is elsewhere, is not kept out.
    elsewhere = {"X-Bednet-Client-Address": "192.0.2.8"}
    response = plant.post("/device_authorization", {"client_id": "meter-1"}, headers=elsewhere)
    assert response.status_code == 200
    asked = response.json or {}
    plant.sent.extend((asked["device_code"], asked["user_code"], asked["user_code"].replace("-", "")))
    assert "192.0.2.8" in submit(plant, "look", asked["user_code"]).get_data(as_text=True)
    plant.clock.now = START + 600
    ask(plant)


# What strangers could fill the database with


def ask_from(plant: Plant, address: str, device: str = "meter-1", **form: Any) -> TestResponse:
    headers = {"X-Bednet-Client-Address": address}
    response = plant.post("/device_authorization", {"client_id": device, **form}, headers=headers)
    found = response.json or {}
    plant.sent.extend(found[name] for name in ("device_code", "user_code") if name in found)
    return response


def requests(plant: Plant) -> list[Any]:
    """Return the device and address of all requests, the oldest first."""
    columns = device_requests.c
    with plant.database.reading() as connection:
        rows = connection.execute(sa.select(columns.device, columns.address).order_by(columns.created)).all()
    return [tuple(row) for row in rows]


@pytest.mark.parametrize(
    ("first", "fourth", "status"),
    [
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", 429),
        ("2001:db8::1", "2001:db8:0:1::1", 200),
        ("192.0.2.7", "192.0.2.8", 200),
        ("192.0.2.7", "::ffff:192.0.2.7", 429),
        ("::ffff:192.0.2.7", "::ffff:192.0.2.8", 200),
        ("", "192.0.2.7", 200),
        ("fe80::1%eth0", "fe80::2%eth0", 429),
    ],
)
def test_addresses_of_one_host_count_as_one(plant: Plant, first: str, fourth: str, status: int) -> None:
    for _ in range(3):
        assert ask_from(plant, first).status_code == 200
    response = ask_from(plant, fourth)
    assert response.status_code == status
    if status == 429:
        refused(plant, response, "slow_down", "too-many-requests", 429)
    assert len(requests(plant)) == (3 if status == 429 else 4)


def test_request_that_is_over_makes_room_soon(plant: Plant) -> None:
    ask(plant)
    denied = ask(plant)
    submit(plant, "deny", denied["user_code"])
    approved = ask(plant)
    submit(plant, "approve", approved["user_code"])
    for later, number in ((659, 4), (660, 2)):
        plant.clock.now = START + later
        ask(plant)
        assert len(requests(plant)) == number


def test_scope_that_is_kept_is_not_long(plant: Plant) -> None:
    shortest = json.dumps([["sensors/hall-1/meter-1/", ["pub"]]])
    longest, longer = (
        scope_text(["sensors/hall-1/meter-1/" + "x" * (size - len(shortest)), ["pub"]]) for size in (3072, 3073)
    )
    assert (len(longest), len(longer)) == (4096, 4098)
    assert ask_from(plant, "192.0.2.7", scope=longest).status_code == 200
    refused(plant, ask_from(plant, "192.0.2.7", scope=longer), "invalid_scope", "scope-too-large")
    assert len(requests(plant)) == 1


def test_who_fills_the_table_pushes_out_their_own(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onboarding, "MOST_REQUESTS", 10)
    mine = ask_from(plant, "192.0.2.7").json or {}
    for number in range(30):
        plant.clock.now = START + number
        # One customer's 65536 networks.
        assert ask_from(plant, f"2001:db8:0:{number:x}::1").status_code == 200
    left = requests(plant)
    assert left == [("meter-1", "192.0.2.7"), *[("meter-1", f"2001:db8:0:{number:x}::1") for number in range(21, 30)]]
    assert submit(plant, "approve", mine["user_code"]).status_code == 200
    assert claims_of(poll(plant, mine["device_code"]))["sub"] == "meter-1"


def test_approved_request_is_never_pushed_out(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onboarding, "MOST_REQUESTS", 2)
    for number in range(2):
        asked = ask_from(plant, f"192.0.2.{number}").json or {}
        submit(plant, "approve", asked["user_code"])
    refused(plant, ask_from(plant, "192.0.2.9"), "slow_down", "too-many-requests", 429)
    assert poll(plant, asked["device_code"]).status_code == 200
    assert ask_from(plant, "192.0.2.9").status_code == 200


def test_device_that_was_revoked_meanwhile_gets_nothing(plant: Plant) -> None:
    asked = ask(plant)
    submit(plant, "approve", asked["user_code"])
    plant.apply(compiled([{**row, "revoked": "superseded"} if row["device"] == "meter-1" else row for row in DEVICES]))
    refused(plant, poll(plant, asked["device_code"]), "invalid_client", "revoked", 401)


def test_codes_are_stored_as_hashes(plant: Plant) -> None:
    asked = ask(plant)
    with plant.database.reading() as connection:
        (row,) = connection.execute(sa.select(device_requests)).mappings().all()
    text = repr(dict(row))
    assert asked["device_code"] not in text
    assert asked["user_code"] not in text
    assert asked["user_code"].replace("-", "") not in text


def test_user_codes_are_many_section_6_1() -> None:
    codes = [onboarding.new_user_code().replace("-", "") for _ in range(500)]
    assert len(set(codes)) == 500
    # Every letter of it may be any.
    assert [set(place) for place in zip(*codes, strict=True)] == [set(onboarding.ALPHABET)] * onboarding.CODE_LETTERS
    assert len(onboarding.ALPHABET) ** onboarding.CODE_LETTERS > 2**34


def test_device_codes_cannot_be_guessed_section_5_2() -> None:
    codes = [onboarding.new_device_code() for _ in range(500)]
    # 256 bits in base64url: the last letter holds four of them.
    kinds = [len(set(place)) for place in zip(*codes, strict=True)]
    assert (len(kinds), min(kinds[:-1]) > 32, kinds[-1]) == (43, True, 16)


# The page (section 3.3)


def test_page_shows_what_is_behind_a_code_section_5_4(plant: Plant) -> None:
    asked = ask(plant, scope=scope_text(["sensors/hall-1/meter-1/#", ["pub"]], ["commands/<b>/#", ["sub"]]))
    text = submit(plant, "look", asked["user_code"]).get_data(as_text=True)
    for shown in ("meter-1", "192.0.2.7", "2027-01-15 08:00:00", "publish to sensors/hall-1/meter-1/#", "You are boss"):
        assert shown in text
    assert "<b>" not in text
    refused_as_pending(plant, asked)


@pytest.mark.parametrize(
    "change",
    [str.lower, lambda code: code.replace("-", ""), lambda code: f" {code} ", lambda code: code.replace("-", " ")],
)
def test_code_may_be_typed_as_people_do_section_6_1(plant: Plant, change: Any) -> None:
    asked = ask(plant)
    assert submit(plant, "look", change(asked["user_code"])).status_code == 200


def test_address_with_the_code_fills_the_form_only_section_3_3_1(plant: Plant) -> None:
    asked = ask(plant)
    page = plant.get(f"/device?user_code={asked['user_code']}", certificate=plant.certificate("boss"))
    assert f'value="{asked["user_code"]}"' in page.get_data(as_text=True)
    assert "approve" not in page.get_data(as_text=True)
    page = plant.get('/device?user_code="><script>', certificate=plant.certificate("boss"))
    assert "<script>" not in page.get_data(as_text=True)


def refused_page(plant: Plant, response: TestResponse, reason: str, status: int = 403) -> None:
    assert (response.status_code, plant.reason()) == (status, reason)
    assert response.mimetype == "text/html"
    assert "Refused" in response.get_data(as_text=True)
    assert 'name="csrf"' not in response.get_data(as_text=True)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    ("who", "reason"),
    [
        (None, "no-certificate"),
        ("edge-1", "not-an-approver"),
        ("watcher", "not-an-approver"),
        ("stranger", "not-an-approver"),
    ],
)
def test_page_is_for_approvers_alone(plant: Plant, method: str, who: str | None, reason: str) -> None:
    asked = ask(plant)
    form = {"csrf": csrf(plant), "action": "approve", "user_code": asked["user_code"], "device": "meter-1"}
    made = None if who is None else certificate(who)
    response = plant.request(method, "/device", form if method == "POST" else None, certificate=made)
    refused_page(plant, response, reason)
    refused_as_pending(plant, asked)


def test_revoked_approver_is_refused(plant: Plant) -> None:
    plant.apply(revoked_serials={"ABC": "privilegeWithdrawn"})
    refused_page(plant, plant.get("/device", certificate=certificate("boss", 0xABC)), "certificate-revoked")
    rows = [{**row, "revoked": "superseded"} if row["device"] == "boss" else row for row in DEVICES]
    plant.apply(compiled(rows))
    refused_page(plant, plant.get("/device", certificate=plant.certificate("boss")), "revoked")
    plant.apply(
        compiled([{**row, "until": START, "reinstated": START} if row["device"] == "boss" else row for row in DEVICES])
    )
    refused_page(plant, plant.get("/device", certificate=plant.certificate("boss")), "until")
    plant.apply(compiled([row for row in DEVICES if row["device"] != "boss"]))
    refused_page(plant, plant.get("/device", certificate=plant.certificate("boss")), "unknown-client")


@pytest.mark.parametrize(
    "proof", ["", "x", "1", f"{START + 600}", f"{START + 600}.0", f"{START + 600}.{'0' * 64}", "9" * 30 + ".x", "é.é"]
)
def test_form_that_the_page_has_not_made_is_refused(plant: Plant, proof: str) -> None:
    asked = ask(plant)
    response = submit(plant, "approve", asked["user_code"], form={"csrf": proof})
    refused_page(plant, response, "csrf")
    refused_as_pending(plant, asked)


def test_form_of_another_approver_is_refused(make_plant: Any) -> None:
    plant = make_plant(approvers=["boss", "watcher"])
    asked = ask(plant)
    refused_page(plant, submit(plant, "approve", asked["user_code"], form={"csrf": csrf(plant, "watcher")}), "csrf")


def test_form_of_another_service_is_refused(plant: Plant, tmp_path: Path) -> None:
    other = Database(f"sqlite:///{tmp_path}/other.db")
    upgrade(other)
    with contextlib.closing(other), other.reading() as connection:
        theirs = connection.execute(sa.select(meta.c.value).where(meta.c.name == "form-key")).scalar()
    mine = csrf(plant)
    with plant.database.writing() as connection:
        connection.execute(meta.update().where(meta.c.name == "form-key").values(value=theirs))
    refused_page(plant, submit(plant, "look", ask(plant)["user_code"], form={"csrf": mine}), "csrf")


def test_without_a_key_for_forms_there_are_none(plant: Plant) -> None:
    asked, mine = ask(plant), csrf(plant)
    with plant.database.writing() as connection:
        connection.execute(meta.delete().where(meta.c.name == "form-key"))
    boss = plant.certificate("boss")
    form = {"csrf": mine, "action": "look", "user_code": asked["user_code"]}
    for response in (plant.post("/device", form, certificate=boss), plant.get("/device", certificate=boss)):
        assert response.status_code == 503
        assert plant.lines()[-1]["reason"] == "database-schema"


def test_form_of_another_site_is_refused(plant: Plant) -> None:
    asked = ask(plant)
    for origin in ("https://evil.example", "null", ISSUER.replace(":8443", "")):
        response = submit(plant, "approve", asked["user_code"], headers={"Origin": origin})
        refused_page(plant, response, "csrf")
    assert submit(plant, "approve", asked["user_code"], headers={"Origin": ISSUER}).status_code == 200


@pytest.mark.parametrize(("later", "reason"), [(599, None), (600, "form-expired"), (-1, "form-expired")])
def test_form_is_good_for_ten_minutes(plant: Plant, later: int, reason: str | None) -> None:
    proof = csrf(plant)
    asked = ask(plant)
    plant.clock.now = START + later
    form = {"csrf": proof, "action": "look", "user_code": asked["user_code"]}
    response = plant.post("/device", form, certificate=plant.certificate("boss"))
    if reason is None:
        assert response.status_code == 200
    else:
        refused_page(plant, response, reason)


@pytest.mark.parametrize("device", ["", "meter-2", "METER-1", "edge-1"])
def test_who_approves_must_name_the_device_section_5_4(plant: Plant, device: str) -> None:
    asked = ask(plant)
    response = submit(plant, "approve", asked["user_code"], device)
    assert (response.status_code, plant.reason()) == (400, "device-mismatch")
    refused_as_pending(plant, asked)


def test_codes_cannot_be_tried_out_section_5_1(plant: Plant) -> None:
    asked = ask(plant)
    for _ in range(10):
        assert submit(plant, "look", "BBBB-BBBB").status_code == 400
    response = submit(plant, "approve", asked["user_code"])
    assert (response.status_code, plant.reason()) == (429, "too-many-codes")
    refused_as_pending(plant, asked)
    plant.clock.now = START + 599
    assert submit(plant, "look", asked["user_code"]).status_code == 429
    plant.clock.now = START + 600
    asked = ask(plant)
    assert submit(plant, "approve", asked["user_code"]).status_code == 200


def test_wrong_ids_beside_a_right_code_count_as_tries(plant: Plant) -> None:
    asked = ask(plant)
    for _ in range(10):
        assert submit(plant, "approve", asked["user_code"], "meter-2").status_code == 400
    assert submit(plant, "approve", asked["user_code"]).status_code == 429
    refused_as_pending(plant, asked)


def test_right_codes_do_not_count_as_tries(plant: Plant) -> None:
    asked = ask(plant)
    for _ in range(15):
        assert submit(plant, "look", asked["user_code"]).status_code == 200


def test_decision_is_made_once(plant: Plant) -> None:
    asked = ask(plant)
    submit(plant, "deny", asked["user_code"])
    assert submit(plant, "approve", asked["user_code"]).status_code == 400
    refused(plant, poll(plant, asked["device_code"]), "access_denied", "access-denied")


def test_two_who_decide_at_once_decide_once(plant: Plant) -> None:
    """Over PostgreSQL both may have found the request open."""
    asked = ask(plant)
    with plant.database.writing() as connection:
        request = onboarding.find(connection, asked["user_code"], START)
        assert request is not None
        assert not onboarding.take(connection, request)
        decided = [
            onboarding.decide(connection, request, approved=approved, approver="boss") for approved in (False, True)
        ]
        assert (decided, onboarding.take(connection, request)) == ([True, False], False)


@pytest.mark.parametrize("form", [{"action": "x"}, {"action": ""}, {"user_code": ""}])
def test_form_that_says_nothing_is_refused(plant: Plant, form: dict[str, str]) -> None:
    response = submit(plant, "look", ask(plant)["user_code"], form=form)
    refused_page(plant, response, "form", 400)


def test_page_can_neither_be_framed_nor_run_scripts(plant: Plant) -> None:
    headers = plant.get("/device", certificate=plant.certificate("boss")).headers
    assert headers["X-Frame-Options"] == "DENY"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == "no-store"
    # With no-referrer browsers send "Origin: null", also with the page's own form.
    assert headers["Referrer-Policy"] == "same-origin"
