# SPDX-License-Identifier: Apache-2.0
"""What ``apply``, ``revoke`` and ``reinstate`` make of a store, and what they refuse.

Sharp edges pinned down here: a store that went from one site to another is the same as one made of the other at once,
and its change log names exactly what is different; a refusal leaves every byte as it was; a dry run says what the real
run then does.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb
import pytest
from hypothesis import given, settings

from bednet import store
from tests.unit.store import sites
from tests.unit.store.sites import PASSWORD, PSK, changes, compiled, content, device, many, profile, rule, secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

KINDS = {
    b"devices": store.DEVICE_CHANGED,
    b"revoked": store.SERIAL_CHANGED,
    b"profiles": store.PROFILE_CHANGED,
    b"issuers": store.ISSUER_CHANGED,
    b"keys": store.ISSUER_CHANGED,
}
SUBJECT = {b"keys": 8}


def said(folder: Path) -> dict[tuple[bytes, bytes], bytes]:
    """Return what a store says to the broker; the rest is what the tool remembers."""
    return {name: value for name, value in content(folder).items() if name[0] not in (b"meta", b"marks")}


def reinstating(
    site: tuple[list[str], sites.Json], before: tuple[list[str], sites.Json]
) -> tuple[list[str], sites.Json]:
    """Let a site follow upon another: with a later list of certificates, and marks for whom it lets in again."""
    revoked = {entry["device"] for entry in sites.read_lines(before[0]) if entry.get("revoked") is not None}
    entries = list(sites.read_lines(site[0]))
    for entry in entries:
        if entry.get("device") in revoked and entry["revoked"] is None:
            entry["reinstated"] = 1
    return [json.dumps(entry) + "\n" for entry in entries], {**site[1], "crl_number": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a store shall be; there is none yet."""
    return tmp_path / "store"


@pytest.fixture
def plant(folder: Path) -> store.Store:
    """A store with three devices, for one test: one with a certificate, one with a password, one with a key."""
    plant = store.Store(folder)
    devices = [device("cert"), device("key", "sensor", "psk"), device("word", "sensor", "certificate", "password")]
    plant.apply(compiled(devices), secrets(passwords={"word": PASSWORD}, psk={"key": PSK}))
    return plant


def record(folder: Path, name: str) -> store.Device:
    found = store.Store(folder).get(name)
    assert found is not None
    return found


@settings(max_examples=60, deadline=None)
@given(sites.sites(), sites.sites())
def test_a_store_that_changed_is_as_one_that_is_new_and_names_what_changed(
    before: tuple[list[str], sites.Json], after: tuple[list[str], sites.Json]
) -> None:
    after = reinstating(after, before)
    with tempfile.TemporaryDirectory() as name:
        folder, fresh = Path(name, "store"), Path(name, "fresh")
        plant = store.Store(folder)
        first = plant.apply(*before)
        was = said(folder)
        told = plant.apply(*after, check=True)
        assert said(folder) == was
        result = plant.apply(*after)
        assert result == told
        assert result["kept_revoked"] == []
        store.Store(fresh).apply(*after)
        now = said(folder)
        assert now == said(fresh)
        different = {name for name in was.keys() | now.keys() if was.get(name) != now.get(name)}
        expected = sorted({(KINDS.get(database, 4), key[: SUBJECT.get(database)]) for database, key in different})
        if any(kind == store.EVERYTHING_CHANGED for kind, _ in expected):
            expected = [(store.EVERYTHING_CHANGED, b"")]
        assert sorted(changes(folder, first["last_change"])) == expected
        assert result["last_change"] == first["last_change"] + len(expected)
        assert result["changed"] is True
        assert plant.status(deep=True)["problems"] == []
        assert plant.apply(*after)["changed"] is False


@settings(max_examples=40, deadline=None)
@given(sites.sites())
def test_a_dump_says_what_was_compiled(site: tuple[list[str], sites.Json]) -> None:
    lines, given_secrets = site
    with tempfile.TemporaryDirectory() as name:
        plant = store.Store(Path(name, "store"))
        plant.apply(*site)
        header, *entries = plant.dump()
    wanted = list(sites.read_lines(lines))
    expected: list[Any] = []
    for entry in wanted:
        if "zone" in entry:
            expected.append({**entry, "zone": store.zone_key(entry["zone"]).hex()})
        elif "rules" in entry:
            key = store.profile_key(entry["profile"]).hex()
            expected.append({"profile": key, "rules": [_shown(item) for item in entry["rules"]]})
        elif "device" in entry:
            expected.append(_shown_device(entry, given_secrets))
    for serial, reason in given_secrets["revoked_serials"].items():
        expected.append({"revoked_serial": store.serial_key(serial).hex(), "reason": reason})
    assert header["devices"] == wanted[0]["devices"]
    assert sorted(map(_text, entries)) == sorted(map(_text, expected))


def _text(line: sites.Json) -> str:
    return json.dumps(line, sort_keys=True)


def _shown(item: sites.Json) -> sites.Json:
    topic: list[str | int] = []
    for part in item["topic"]:
        if isinstance(part, str) and topic and isinstance(topic[-1], str):
            topic[-1] += part
        else:
            topic.append(part)
    during = [{**window, "zone": store.zone_key(window["zone"]).hex()} for window in item["during"]]
    return {**item, "topic": topic, "during": during}


def _shown_device(entry: sites.Json, given_secrets: sites.Json) -> sites.Json:
    entry = {key: value for key, value in entry.items() if key != "token"}
    held = {"certificate", "token"} | ({"password", "psk"} if entry["device"] in given_secrets["passwords"] else set())
    if entry["revoked"] is not None:
        held = {"certificate", "token"}
    ways = [way for way in store.AUTHENTICATION if way in held and way in entry["authentication"]]
    return {**entry, "profile": store.profile_key(entry["profile"]).hex(), "authentication": ways}


def test_secrets_get_into_the_records_and_not_into_a_dump(plant: store.Store) -> None:
    assert record(plant.folder, "word").password == store.Password(101, sites.SALT, sites.HASH)
    assert record(plant.folder, "key").psk == bytes.fromhex(PSK)
    shown = json.dumps(list(plant.dump()))
    assert '"password"' in shown
    assert '"psk"' in shown
    for secret in (PSK, PASSWORD.rsplit("$", 1)[1], sites.HASH.hex()):
        assert secret not in shown


def test_a_dump_of_one_device_has_its_profile_too(plant: store.Store) -> None:
    names = [line.get("device", "profile") for line in plant.dump("cert")]
    assert names == ["cert", "profile"]
    with pytest.raises(store.Refused, match="no device 'nobody'"):
        list(plant.dump("nobody"))


def test_a_secret_that_is_missing_or_that_nobody_uses_is_named(plant: store.Store) -> None:
    devices = [
        device("cert"),
        device("key", "sensor", "psk"),
        device("word", "sensor", "password", revoked="superseded"),
    ]
    given_secrets = secrets(passwords={"word": PASSWORD, "cert": PASSWORD}, psk={"gone": PSK})
    result = plant.apply(compiled(devices), given_secrets)
    assert result["without_secret"] == ["key"]
    assert result["unused_secrets"] == ["cert", "gone", "word"]
    assert record(plant.folder, "key") == store.Device(store.profile_key("sensor"))
    assert record(plant.folder, "cert").password is None


SITE_OF_PLANT = [device("cert"), device("key", "sensor", "psk"), device("word", "sensor", "certificate", "password")]
SECRETS_OF_PLANT = secrets(passwords={"word": PASSWORD}, psk={"key": PSK})


def marked(mark: int, *names: str) -> list[str]:
    """Return the site of the plant, in which devices were reinstated."""
    return compiled([{**entry, "reinstated": mark} if entry["device"] in names else entry for entry in SITE_OF_PLANT])


def test_a_roll_out_that_began_before_a_revocation_does_not_undo_it(plant: store.Store) -> None:
    plant.revoke("word", "keyCompromise")
    plant.revoke("key", "superseded")
    before = content(plant.folder)
    told = plant.apply(compiled(SITE_OF_PLANT), SECRETS_OF_PLANT, check=True)
    result = plant.apply(compiled(SITE_OF_PLANT), SECRETS_OF_PLANT)
    named = [{"device": "key", "reason": "superseded"}, {"device": "word", "reason": "keyCompromise"}]
    assert result == told
    assert (result["kept_revoked"], result["reinstated"], result["changed"]) == (named, [], False)
    assert content(plant.folder) == before
    # What else the site says of it is taken over.
    moved = [{**entry, "until": 7} if entry["device"] == "word" else entry for entry in SITE_OF_PLANT]
    assert plant.apply(compiled(moved), SECRETS_OF_PLANT)["kept_revoked"] == named
    assert record(plant.folder, "word")[2:7] == (True, None, None, 7, 1)


def test_a_mark_of_a_reinstatement_brings_back_once_and_wherever_it_comes(plant: store.Store) -> None:
    before = content(plant.folder)
    plant.revoke("word", "superseded")
    plant.revoke("key", "superseded")
    result = plant.apply(marked(100, "word"), SECRETS_OF_PLANT)
    assert result["reinstated"] == [{"device": "word", "reason": "superseded"}]
    assert result["kept_revoked"] == [{"device": "key", "reason": "superseded"}]
    plant.apply(marked(100, "word", "key"), SECRETS_OF_PLANT)
    marks = {key: value for key, value in content(plant.folder).items() if key[0] == b"marks"}
    assert {key: value for key, value in content(plant.folder).items() if key not in marks} == before
    assert marks.keys() == {(b"marks", b"word"), (b"marks", b"key")}
    assert plant.apply(marked(100, "word", "key"), SECRETS_OF_PLANT)["changed"] is False
    plant.revoke("word", "superseded")
    for mark in (99, 100):
        assert plant.apply(marked(mark, "word"), SECRETS_OF_PLANT)["kept_revoked"] != []
    # A site without any mark does not make the store forget the last one.
    plant.apply(compiled(SITE_OF_PLANT), SECRETS_OF_PLANT)
    assert plant.apply(marked(100, "word"), SECRETS_OF_PLANT)["kept_revoked"] != []
    assert plant.apply(marked(101, "word"), SECRETS_OF_PLANT)["reinstated"] != []
    assert record(plant.folder, "word").revoked is None


def test_a_mark_of_a_device_that_is_in_service_counts_from_then_on(plant: store.Store) -> None:
    last = plant.status()["last_change"]
    result = plant.apply(marked(100, "word"), SECRETS_OF_PLANT)
    assert (result["changed"], result["changed_devices"], result["last_change"]) == (True, 0, last)
    plant.revoke("word", "superseded")
    assert plant.apply(marked(100, "word"), SECRETS_OF_PLANT)["kept_revoked"] != []


def test_a_revocation_tells_the_mark_that_a_store_has_not_heard_of(plant: store.Store) -> None:
    """The gateway was away while the device was reinstated, and a run from then comes after the next revocation."""
    plant.revoke("word", "superseded", 100)
    assert plant.apply(marked(100, "word"), SECRETS_OF_PLANT)["kept_revoked"] != []
    assert plant.revoke("word", "superseded", 100)["changed"] is False
    assert plant.apply(marked(101, "word"), SECRETS_OF_PLANT)["kept_revoked"] == []


def test_the_site_revokes_whatever_its_mark(plant: store.Store) -> None:
    plant.apply(marked(100, "word"), SECRETS_OF_PLANT)
    gone = [{**entry, "revoked": "superseded"} if entry["device"] == "word" else entry for entry in SITE_OF_PLANT]
    assert plant.apply(compiled(gone), SECRETS_OF_PLANT)["revoked"] == ["word"]
    assert plant.apply(marked(100, "word"), SECRETS_OF_PLANT)["kept_revoked"] != []


def test_a_revoked_device_that_the_site_forgot_does_not_come_back_with_an_older_list(plant: store.Store) -> None:
    plant.revoke("word", "superseded")
    plant.apply(compiled(SITE_OF_PLANT[:2]), SECRETS_OF_PLANT)
    assert plant.get("word") is None
    result = plant.apply(compiled(SITE_OF_PLANT), SECRETS_OF_PLANT)
    assert result["kept_revoked"] == [{"device": "word", "reason": "superseded"}]
    assert record(plant.folder, "word").revoked == store.REASONS["superseded"]
    assert plant.apply(marked(1, "word"), SECRETS_OF_PLANT)["reinstated"] == [
        {"device": "word", "reason": "superseded"}
    ]
    # One that was in service is just gone.
    plant.apply(compiled(SITE_OF_PLANT[1:]), SECRETS_OF_PLANT)
    assert plant.apply(compiled(SITE_OF_PLANT), SECRETS_OF_PLANT)["kept_revoked"] == []


def test_a_damaged_mark_lets_nobody_in_and_is_named(plant: store.Store) -> None:
    plant.apply(marked(100, "word"), SECRETS_OF_PLANT)
    plant.revoke("word", "superseded")
    with lmdb.open(str(plant.folder), max_dbs=11) as environment:
        marks = environment.open_db(b"marks", create=False)
        with environment.begin(write=True) as transaction:
            transaction.put(b"word", b"?", db=marks)
    assert plant.apply(marked(1 << 40, "word"), SECRETS_OF_PLANT)["kept_revoked"] != []
    assert "mark 776f7264: it ends too early" in plant.status(deep=True)["problems"][0]
    assert plant.revoke("word", "keyCompromise", 100)["revoked"] == "keyCompromise"


def test_a_store_of_layout_1_becomes_one_of_layout_2_and_forgets_nothing(plant: store.Store) -> None:
    plant.revoke("word", "superseded")
    before = content(plant.folder)
    with lmdb.open(str(plant.folder), max_dbs=11) as environment:
        newer = {name: environment.open_db(name, create=False) for name in store.DATABASES}
        with environment.begin(write=True) as transaction:
            record_of_meta = transaction.get(b"meta", db=newer[b"meta"])
            assert isinstance(record_of_meta, bytes)
            transaction.put(b"meta", record_of_meta[:8] + b"\1" + record_of_meta[9:], db=newer[b"meta"])
            for name in set(store.DATABASES) - set(store.DATABASES_1):
                transaction.drop(newer[name])
    for work in (plant.status, lambda: list(plant.dump()), lambda: plant.revoke("cert", "superseded")):
        with pytest.raises(
            store.Refused, match=r"has layout 1, .* layout 2\. Cure: run playbooks/site\.yml, which brings"
        ):
            work()
    told = plant.apply(compiled(SITE_OF_PLANT), SECRETS_OF_PLANT, check=True)
    result = plant.apply(compiled(SITE_OF_PLANT), SECRETS_OF_PLANT)
    assert result == told
    assert (result["changed"], result["everything"]) == (True, True)
    assert result["kept_revoked"] == [{"device": "word", "reason": "superseded"}]
    assert content(plant.folder) == before
    assert plant.status(deep=True)["problems"] == []
    assert plant.apply(compiled(SITE_OF_PLANT), SECRETS_OF_PLANT)["changed"] is False


def serials(plant: store.Store) -> set[bytes]:
    return {key for name, key, _ in plant.raw() if name == b"revoked"}


def test_an_older_list_of_revoked_certificates_takes_none_away(plant: store.Store) -> None:
    lines = compiled(SITE_OF_PLANT)

    def apply(number: int | None, *names: str) -> sites.Json:
        more = {} if number is None else {"crl_number": number}
        return plant.apply(
            lines, {**secrets(revoked_serials=dict.fromkeys(names, "superseded"), passwords={"word": PASSWORD}), **more}
        )

    assert apply(7, "0a", "0b")["revoked_serials"] == 2
    result = apply(6, "0a", "0c")
    assert (result["revoked_serials"], result["older_crl"]) == (1, True)
    assert serials(plant) == {b"\x0a", b"\x0b", b"\x0c"}
    # Of unknown age, likewise.
    assert apply(None)["older_crl"] is False
    assert serials(plant) == {b"\x0a", b"\x0b", b"\x0c"}
    # The list as it was, and a newer one: what has run out leaves it.
    result = apply(7, "0a", "0b")
    assert (result["revoked_serials"], result["older_crl"]) == (1, False)
    apply(8, "0b")
    assert serials(plant) == {b"\x0b"}
    assert apply(1 << 80, "0b")["changed"] is True
    assert apply(1 << 80, "0b")["changed"] is False
    assert apply(8)["older_crl"] is True


def test_a_device_that_the_site_revokes_is_named(plant: store.Store) -> None:
    devices = [device("cert", revoked="keyCompromise"), device("new", revoked="superseded")]
    result = plant.apply(compiled(devices), secrets())
    assert result["revoked"] == ["cert", "new"]
    assert (result["added"], result["changed_devices"], result["removed"]) == (1, 1, 2)


def test_revoking_forgets_the_secrets_and_is_logged(plant: store.Store) -> None:
    last = plant.status()["last_change"]
    result = plant.revoke("word", "keyCompromise")
    assert result["changed"] is True
    assert result["revoked"] == "keyCompromise"
    assert record(plant.folder, "word") == store.Device(store.profile_key("sensor"), certificate=True, revoked=1)
    assert changes(plant.folder, last) == [(store.DEVICE_CHANGED, b"word")]
    assert not any(sites.HASH in value for value in content(plant.folder).values())
    assert plant.revoke("word", "keyCompromise")["changed"] is False
    assert changes(plant.folder, last) == [(store.DEVICE_CHANGED, b"word")]


def test_a_revoked_device_comes_back_without_its_secrets(plant: store.Store) -> None:
    plant.revoke("word", "cessationOfOperation")
    last = plant.status()["last_change"]
    result = plant.reinstate("word")
    assert (result["changed"], result["revoked"]) == (True, None)
    assert record(plant.folder, "word") == store.Device(store.profile_key("sensor"), certificate=True)
    assert changes(plant.folder, last) == [(store.DEVICE_CHANGED, b"word")]
    assert plant.reinstate("word")["changed"] is False


def test_nobody_comes_back_after_a_key_compromise(plant: store.Store) -> None:
    plant.revoke("cert", "superseded")
    plant.revoke("cert", "keyCompromise")
    with pytest.raises(store.Refused, match="the key of cert is compromised"):
        plant.reinstate("cert")
    with pytest.raises(store.Refused, match="cannot be made less"):
        plant.revoke("cert", "superseded")
    assert record(plant.folder, "cert").revoked == store.COMPROMISED


@pytest.mark.parametrize("name", ["nobody", "", "a/b", "x" * 600, "\udcff"])
def test_a_device_that_is_not_there_cannot_be_revoked(plant: store.Store, name: str) -> None:
    before = list(plant.raw())
    with pytest.raises(store.Refused, match="the store has no device"):
        plant.revoke(name, "superseded")
    with pytest.raises(store.Refused, match="the store has no device"):
        plant.reinstate(name)
    assert list(plant.raw()) == before


def alone(entry: sites.Json, *rules: sites.Json, names: Iterable[str] = ()) -> str:
    """Return what ``put`` reads: a device's profile, and the device."""
    return "".join(json.dumps(line) + "\n" for line in (profile(str(entry["profile"]), *rules, names=names), entry))


def line_of(name: str, *authentication: str, **more: Any) -> str:
    return alone(device(name, "sensor", *authentication, **more))


def test_one_device_is_written_without_a_look_at_the_others(plant: store.Store) -> None:
    last = plant.status()["last_change"]
    lines = line_of("new", "password", until=1_800_000_000)
    given_secrets = secrets(passwords={"new": PASSWORD, "word": PASSWORD})
    assert plant.put(lines, given_secrets)["devices"] == 4
    password = store.Password(101, sites.SALT, sites.HASH)
    assert plant.get("new") == store.Device(store.profile_key("sensor"), password=password, until=1_800_000_000)
    assert plant.put(lines, given_secrets)["changed"] is False
    assert changes(plant.folder, last) == [(store.DEVICE_CHANGED, b"new")]


def test_one_device_keeps_the_secrets_that_it_has(plant: store.Store) -> None:
    result = plant.put(line_of("word", "certificate", "password", until=7))
    assert (result["changed"], result["without_secret"]) == (True, [])
    password = store.Password(101, sites.SALT, sites.HASH)
    assert record(plant.folder, "word") == store.Device(store.profile_key("sensor"), (), True, password, None, 7)
    assert plant.put(line_of("word", "certificate", "password", until=7))["changed"] is False
    assert plant.put(line_of("key", "psk", "password"))["without_secret"] == ["key"]
    assert record(plant.folder, "key").psk == bytes.fromhex(PSK)
    assert plant.put(line_of("key", "certificate"))["without_secret"] == []
    assert record(plant.folder, "key") == store.Device(store.profile_key("sensor"), certificate=True)
    assert plant.put(line_of("new", "token"))["devices"] == 4


def test_one_device_that_is_revoked_stays_so_until_there_is_a_mark(plant: store.Store) -> None:
    plant.revoke("word", "superseded")
    before = list(plant.raw())
    with pytest.raises(store.Refused, match=r"word is revoked \(superseded\), and was not reinstated since"):
        plant.put(line_of("word", "certificate", "password"))
    assert list(plant.raw()) == before
    result = plant.put(line_of("word", "certificate", "password", reinstated=5))
    assert result["reinstated"] == [{"device": "word", "reason": "superseded"}]
    # Its secret is gone, and comes with the next roll-out.
    assert result["without_secret"] == ["word"]
    assert plant.put(line_of("word", "certificate", revoked="superseded", reinstated=5))["revoked"] == ["word"]
    with pytest.raises(store.Refused, match="word is revoked"):
        plant.put(line_of("word", "certificate", reinstated=5))
    # A mark of one in service counts from then on.
    plant.put(line_of("cert", reinstated=9))
    plant.revoke("cert", "superseded")
    with pytest.raises(store.Refused, match="cert is revoked"):
        plant.put(line_of("cert", reinstated=9))


def test_one_device_that_was_revoked_and_is_no_longer_listed_does_not_come_back_alone(plant: store.Store) -> None:
    plant.revoke("word", "superseded")
    plant.apply(compiled([device("cert")]), secrets())
    assert plant.get("word") is None
    with pytest.raises(store.Refused, match=r"word is revoked \(superseded\)"):
        plant.put(line_of("word"))
    assert plant.put(line_of("word", reinstated=1))["reinstated"] == [{"device": "word", "reason": "superseded"}]


def test_a_compromise_of_one_device_is_not_made_less(plant: store.Store) -> None:
    plant.revoke("word", "keyCompromise")
    before = list(plant.raw())
    with pytest.raises(store.Refused, match="that cannot be made less"):
        plant.put(line_of("word", revoked="superseded"))
    assert list(plant.raw()) == before
    # It has new keys since, and is revoked once more.
    assert plant.put(line_of("word", revoked="superseded", reinstated=5))["changed"] is True
    assert record(plant.folder, "word").revoked == store.REASONS["superseded"]


def test_one_device_is_the_same_alone_and_among_the_others(plant: store.Store, tmp_path: Path) -> None:
    rules = rule("role/x/allow/publish/0", 1, "/", 2, during=[{"days": 1, "from": 0, "to": 9, "zone": "Europe/Berlin"}])
    lines = compiled([device("a", "x", values=["1", "2"])], [profile("x", rules, names=["n", "m"])], [sites.BERLIN])
    whole = store.Store(tmp_path / "whole")
    whole.apply(lines, secrets())
    expected = content(whole.folder)
    whole.put(lines[2] + json.dumps(json.loads(lines[3]) | {"until": 7}) + "\n", secrets())
    assert content(whole.folder) != expected
    whole.put(lines[2] + lines[3], secrets())
    assert content(whole.folder) == expected


SENSOR = json.dumps(profile()) + "\n"
NEW = json.dumps(device("new")) + "\n"


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (alone(device("new", "unknown")), "no device with the roles and rules of new so far"),
        (alone(device("new/#")), "'new/#' cannot be a device's id"),
        (alone(device("new") | {"device": 7}), "7 cannot be a device's id"),
        (alone(device("bednet-probe")), "'bednet-probe' is no device of the site"),
        (alone(device("new", values=["+"]), names=["n"]), "which cannot stand in a topic"),
        (alone(device("new", values=["1"])), "has not the 0 values of its profile"),
        (SENSOR + json.dumps(device("new", "other")) + "\n", "which the file does not list"),
        (SENSOR + json.dumps(device("new") | {"profile": None}) + "\n", "which the file does not list"),
        (SENSOR + NEW[:-1], "the line has no end"),
        (NEW, "a profile"),
        (SENSOR, "the file ends too early"),
        (SENSOR + NEW + NEW, "stdin:3: more lines than a profile and a device"),
        ("", "the file ends too early"),
    ],
)
def test_one_device_that_is_unsound_is_refused(plant: store.Store, lines: str, why: str) -> None:
    before = list(plant.raw())
    with pytest.raises(store.Refused, match=why):
        plant.put(lines, secrets())
    assert list(plant.raw()) == before


@pytest.mark.parametrize(
    "other",
    [
        # The same values would mean something else, or too many topics.
        alone(device("a", "x", values=["1"]), rule("role/x/allow/publish/0", "b/", 1), names=["m"]),
        alone(device("a", "x"), rule("role/x/allow/publish/0", "a/1"), names=[]),
        alone(device("a", "x", values=["1"]), rule("role/x/allow/publish/0", "a/", 1), rule(), names=["n"]),
    ],
)
def test_one_device_of_another_policy_is_refused(folder: Path, other: str) -> None:
    plant = store.Store(folder)
    rules = rule("role/x/allow/publish/0", "a/", 1)
    plant.apply(compiled([device("a", "x", values=["1"])], [profile("x", rules, names=["n"])]), secrets())
    before = list(plant.raw())
    with pytest.raises(store.Refused, match="the profile of a says something else in the store"):
        plant.put(other)
    assert list(plant.raw()) == before


def test_a_list_of_the_ca_adds_serial_numbers_and_takes_none_away(plant: store.Store) -> None:
    plant.apply(compiled([device("cert")]), secrets(revoked_serials={"0A": "superseded"}) | {"crl_number": 7})
    last = plant.status()["last_change"]
    told = {"crl_number": 8, "revoked_serials": {"0b": "keyCompromise"}}
    result = plant.add_serials(told)
    assert (result["changed"], result["revoked_serials"], result["older_crl"]) == (True, 1, False)
    assert changes(plant.folder, last) == [(store.SERIAL_CHANGED, b"\x0b")]
    known = {key: number for database, key, number in plant.raw() if database == b"revoked"}
    assert known == {b"\x0a": b"\x04", b"\x0b": b"\x01"}
    # The same list, and an older one, say nothing new.
    for number in (8, 6):
        result = plant.add_serials({"crl_number": number, "revoked_serials": {"0c": "superseded"}})
        assert (result["changed"], result["revoked_serials"], result["older_crl"]) == (False, 0, number == 6)
    # A roll-out that has not heard of it yet takes nothing away; one that has makes it exact.
    lines = compiled([device("cert")])
    assert plant.apply(lines, secrets(revoked_serials={"0A": "superseded"}) | {"crl_number": 7})["older_crl"] is True
    assert {key for database, key, _ in plant.raw() if database == b"revoked"} == {b"\x0a", b"\x0b"}
    assert plant.apply(lines, secrets(revoked_serials={"0B": "superseded"}) | {"crl_number": 8})["changed"] is True
    assert {key for database, key, _ in plant.raw() if database == b"revoked"} == {b"\x0b"}


@pytest.mark.parametrize(
    "told",
    [
        None,
        [],
        {},
        {"crl_number": 9},
        {"crl_number": None, "revoked_serials": {}},
        {"crl_number": "9", "revoked_serials": {}},
        {"crl_number": -1, "revoked_serials": {}},
        {"crl_number": 9, "revoked_serials": {"xyz": "superseded"}},
        {"crl_number": 9, "revoked_serials": {"0a": "whatever"}},
        {"crl_number": 9, "revoked_serials": {}, "passwords": {"word": PASSWORD}},
    ],
)
def test_a_list_that_is_none_changes_nothing(plant: store.Store, told: object) -> None:
    before = list(plant.raw())
    with pytest.raises(store.Refused):
        plant.add_serials(told)
    assert list(plant.raw()) == before


def test_a_list_makes_no_store(folder: Path) -> None:
    with pytest.raises(store.Refused, match="there is no store"):
        store.Store(folder).add_serials({"crl_number": 9, "revoked_serials": {}})
    assert not folder.exists()


def test_many_changes_at_once_are_one_entry_that_says_everything(folder: Path) -> None:
    plant = store.Store(folder)
    some, more = store.CHANGES_AT_ONCE, store.CHANGES_AT_ONCE + 1
    plant.apply(many(more), secrets())
    assert changes(folder) == [(store.EVERYTHING_CHANGED, b"")]
    lines = many(more, location="hall-2")
    all_but_one = [*lines[:-1], many(more)[-1]]
    assert plant.apply(all_but_one, secrets())["last_change"] == 1 + some
    assert {kind for kind, _ in changes(folder, 1)} == {store.DEVICE_CHANGED}
    result = plant.apply(many(more, location="hall-3"), secrets())
    assert result["everything"] is True
    assert changes(folder, 1 + some) == [(store.EVERYTHING_CHANGED, b"")]


def test_the_change_log_keeps_the_newest_entries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHANGES_KEPT", 5)
    plant = store.Store(folder)
    plant.apply(compiled([device("a"), device("b")]), secrets())
    for _ in range(4):
        plant.revoke("a", "superseded")
        plant.reinstate("a")
    numbers = [int.from_bytes(key, "big") for name, key, _ in plant.raw() if name == b"changes"]
    assert numbers == [7, 8, 9, 10, 11]
    assert plant.status()["last_change"] == 11


def test_a_change_of_a_profile_leaves_its_devices_alone(folder: Path) -> None:
    plant = store.Store(folder)
    devices = [device("a"), device("b", "other")]
    plant.apply(compiled(devices, [profile(), profile("other")]), secrets())
    last = plant.status()["last_change"]
    denied = rule("role/other/deny/publish/0", "sensors/#")
    result = plant.apply(compiled(devices, [profile(), profile("other", rule(), denied)]), secrets())
    assert (result["profiles"], result["changed_devices"]) == (1, 0)
    assert changes(folder, last) == [(store.PROFILE_CHANGED, store.profile_key("other"))]


def test_a_change_of_a_zone_changes_everything(folder: Path) -> None:
    plant = store.Store(folder)
    plant.apply(compiled([device("a")], zones=[sites.BERLIN]), secrets())
    last = plant.status()["last_change"]
    other = {**sites.BERLIN, "transitions": [[-62135596800, 3600]]}
    result = plant.apply(compiled([device("b")], zones=[other]), secrets())
    assert (result["zones"], result["everything"]) == (1, True)
    assert changes(folder, last) == [(store.EVERYTHING_CHANGED, b"")]


# What is refused

GOOD = compiled([device("a"), device("b")], [profile(names=["x"]), profile("other")], [sites.BERLIN])


def with_device(**more: Any) -> list[str]:
    return compiled([device("a"), device("b") | more])


def with_rule(**more: Any) -> list[str]:
    return compiled([device("a")], [profile("sensor", rule(**more))], [sites.BERLIN])


def with_window(**more: Any) -> list[str]:
    return with_rule(during=[{"days": 1, "from": 0, "to": 1, "zone": "Europe/Berlin", **more}])


def header(**more: Any) -> list[str]:
    lines = compiled([device("a"), device("b")])
    return [json.dumps(json.loads(lines[0]) | more) + "\n", *lines[1:]]


UNSOUND: dict[str, tuple[list[str], str]] = {
    "nothing": ([], ":1: the file ends too early"),
    "no JSON": (["hello\n"], ":1: the line is not JSON"),
    "a list": (["[]\n"], ":1: the first line must be an object with bednet-compiled"),
    "deep": (["[" * 100_000 + "\n"], ":1: the line is not JSON"),
    "another format": (header(**{"bednet-compiled": 1}), ":1: the format is 1, and this tool reads format 2"),
    "a count that is none": (header(devices="2"), "'devices' must be a whole number"),
    "a truth for a count": (header(devices=True), "'devices' must be a whole number"),
    "cut off at a line": (compiled([device("a"), device("b")])[:-1], ":4: the file ends too early"),
    "cut off within a line": ([*compiled([device("a")])[:-1], '{"device": "a"'], ":3: the line has no end"),
    "more devices than it says": (header(devices=1), ":4: more lines than the first line says"),
    "a device too few": (header(devices=3), ":5: the file ends too early"),
    "not in order": (compiled([device("b"), device("a")]), ":4: device 'a' stands after 'b', not in order"),
    "twice": (compiled([device("a"), device("a")]), ":4: device 'a' is listed twice"),
    "unknown profile": (with_device(profile="x"), ":4: device 'b' has the profile 'x', which the file does not list"),
    "a profile that is none": (with_device(profile=[]), "has the profile \\[\\], which"),
    "bad id": (with_device(device="b/#"), "'b/#' cannot be a device's id"),
    "reserved id": (with_device(device="bednet-x"), "'bednet-x' cannot be a device's id"),
    "reserved id in capitals": (with_device(device="BEDNET-probe"), "'BEDNET-probe' cannot be"),
    "an id that is a number": (with_device(device=7), "7 cannot be a device's id"),
    "an id with a line end": (with_device(device="b\n"), "cannot be a device's id"),
    "too many values": (with_device(values=["x"]), "device 'b' has not the 0 values of its profile"),
    "too few values": (compiled([device("a")], [profile(names=["x"])]), "device 'a' has not the 1 values"),
    "no authentication": (with_device(authentication=[]), "device 'b' has no way to authenticate"),
    "unknown authentication": (
        with_device(authentication=["word"]),
        "'b' authenticates with 'word', which is unknown",
    ),
    "until zero": (with_device(until=0), "device 'b': until must be a whole number from 1"),
    "until text": (with_device(until="2026"), "device 'b': until must be a whole number"),
    "unknown reason": (with_device(revoked="boredom"), "device 'b' is revoked for 'boredom', which is no reason"),
    "unknown field": (with_device(admin=True), ":4: a device must be an object with authentication, device"),
    "profile twice": (compiled([], [profile(), profile()]), ":3: profile 'sensor' is listed twice"),
    "zone twice": (compiled([], [], [sites.BERLIN, sites.BERLIN]), ":3: zone 'Europe/Berlin' is listed twice"),
    "zone without changes": (compiled([], [], [{"zone": "UTC", "transitions": []}]), "zone 'UTC' has no transitions"),
    "zone out of order": (compiled([], [], [{"zone": "UTC", "transitions": [[1, 0], [1, 2]]}]), "out of order"),
    "zone of texts": (compiled([], [], [{"zone": "UTC", "transitions": ["ab"]}]), "must be a whole number"),
    "zone of numbers": (compiled([], [], [{"zone": "UTC", "transitions": [1]}]), "must be \\[second, offset\\]"),
    "unknown effect": (with_rule(effect="perhaps"), "has no effect or access that is known"),
    "unknown access": (with_rule(access=["publish"]), "has no effect or access that is known"),
    "an empty topic": (compiled([], [profile("s", rule() | {"topic": []})]), "the topic is empty"),
    "an empty text": (compiled([], [profile("s", rule() | {"topic": [""]})]), "topic must be text of 1 to"),
    "a long topic": (compiled([], [profile("s", rule() | {"topic": ["x" * 40_000] * 2})]), "longer than 65535 bytes"),
    "a NUL in a topic": (compiled([], [profile("s", rule() | {"topic": ["a\0"]})]), "topic must be text of"),
    "a lone surrogate": (compiled([], [profile("s", rule() | {"topic": ["\ud800"]})]), "topic must be text of"),
    "unknown placeholder": (compiled([], [profile("s", rule() | {"topic": [1]})]), "a placeholder must be a whole"),
    "a window without days": (with_window(days=0), "days must be a whole number from 1 to 127"),
    "a window from nowhere": (with_window(**{"from": 86_400}), "from must be a whole number from 0 to 86399"),
    "a window to nowhere": (with_window(to=86_401), "to must be a whole number from 0 to 86400"),
    "a window in no zone": (with_window(zone="Mars/Olympus"), "there is no zone 'Mars/Olympus'"),
    "a network with host bits": (with_rule(networks=["10.0.0.1/8"]), "'10.0.0.1/8' is not a network"),
    "a long rule id": (with_rule(id="x" * 256), "a rule's id must be text of 1 to 255 bytes"),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_site_is_refused_with_its_line_and_changes_nothing(plant: store.Store, name: str) -> None:
    lines, why = UNSOUND[name]
    before = list(plant.raw())
    for check in (True, False):
        with pytest.raises(store.Refused, match=why) as refusal:
            plant.apply(lines, secrets(), check=check)
        assert "Cure: make it again with bednet compile --output" in str(refusal.value)
    assert list(plant.raw()) == before


def test_the_site_that_is_made_unsound_above_is_sound(plant: store.Store) -> None:
    assert plant.apply(with_window(), secrets())["changed"] is True
    assert plant.apply(header(), secrets())["changed"] is True


@pytest.mark.parametrize(
    "value", ["", "a/b", "+", "#", "a+b", "$SYS", " a", "a ", "a\nb", "a\0b", "x" * 256, "ä" * 128, 7]
)
def test_a_value_that_would_reach_into_other_topics_is_refused(plant: store.Store, value: object) -> None:
    lines = compiled([device("a", values=[value])], [profile(names=["x"])])
    with pytest.raises(store.Refused, match="device 'a'"):
        plant.apply(lines, secrets())


SALTY = PASSWORD.replace("$101$", "${}$")


@pytest.mark.parametrize(
    ("given_secrets", "why"),
    [
        ({}, "must be a JSON object with passwords, psk, revoked_serials"),
        ([], "must be a JSON object with"),
        ({**secrets(), "more": {}}, "must be a JSON object with"),
        ({**secrets(), "passwords": []}, "passwords must be a JSON object of strings"),
        (secrets(psk={"key": 7}), "psk must be a JSON object of strings"),
        (secrets(passwords={"word": "secret-word"}), "the password of word is not of the form"),
        (secrets(passwords={"word": SALTY.format(10_001)}), "has 10001 iterations, and the broker can bear 10000"),
        (secrets(passwords={"word": SALTY.format(0)}), "is not of the form"),
        (secrets(passwords={"word": "$7$101$AAA$AAAA"}), "a salt or hash that is not base64"),
        (secrets(passwords={"word": "$7$101$AAAA$AAAA"}), "no hash of 64 bytes"),
        (secrets(psk={"key": "xyz"}), "the pre-shared key of key is not 16 to 64 bytes in hexadecimal"),
        (secrets(psk={"key": PSK[2:]}), "is not 16 to 64 bytes"),
        (secrets(psk={"key": PSK * 5}), "is not 16 to 64 bytes"),
        (secrets(psk={"key": PSK[:-1]}), "is not 16 to 64 bytes"),
        (secrets(revoked_serials={"0": "superseded"}), "'0' is not a certificate's serial number"),
        (secrets(revoked_serials={"0a": "boredom"}), "'boredom' is not a reason"),
        (secrets(revoked_serials={"0a": "superseded", "A": "superseded"}), "A is there twice"),
    ],
)
def test_secrets_that_cannot_be_used_are_refused_and_not_shown(
    plant: store.Store, given_secrets: object, why: str
) -> None:
    before = list(plant.raw())
    devices = [device("cert"), device("key", "sensor", "psk"), device("word", "sensor", "password")]
    with pytest.raises(store.Refused, match=why) as refusal:
        plant.apply(compiled(devices), given_secrets)
    assert "Cure:" in str(refusal.value)
    for secret in ("secret-word", PSK[2:-1], "AAAA", PASSWORD.rsplit("$", 1)[1]):
        assert secret not in str(refusal.value)
    assert list(plant.raw()) == before


def test_a_refusal_where_there_was_no_store_leaves_none_that_a_broker_would_take(folder: Path) -> None:
    plant = store.Store(folder)
    with pytest.raises(store.Refused, match="is listed twice"):
        plant.apply(compiled([device("a"), device("a")]), secrets())
    assert list(plant.raw()) == []
    with pytest.raises(store.Refused, match="there is no store"):
        plant.status()
    assert plant.apply(compiled([device("a")]), secrets())["added"] == 1


@pytest.mark.parametrize(
    "work",
    [
        lambda plant: plant.revoke("a", "superseded"),
        lambda plant: plant.reinstate("a"),
        lambda plant: list(plant.dump()),
    ],
)
def test_nothing_is_done_to_a_store_that_is_not_there(folder: Path, work: Callable[[store.Store], object]) -> None:
    with pytest.raises(store.Refused, match=r"there is no store\. Cure: run playbooks/site\.yml"):
        work(store.Store(folder))
    assert not folder.exists()


def test_a_dry_run_where_there_is_no_store_makes_none(folder: Path) -> None:
    plant = store.Store(folder)
    lines = compiled([device("a")])
    told = plant.apply(lines, secrets(), check=True)
    assert not folder.exists()
    assert told == plant.apply(lines, secrets())
    assert (told["changed"], told["added"]) == (True, 1)
