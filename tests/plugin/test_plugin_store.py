# SPDX-License-Identifier: Apache-2.0
"""A store that is absent, damaged or of another layout never opens the gate: the broker does not start, or denies."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import lmdb
import pytest

from bednet.store import LAYOUT
from tests.plugin.gateway import Gateway, Site, allow, broker_version

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.plugin.conftest import Start
    from tests.plugin.pki import Authority


def write(folder: Path, database: bytes, key: bytes, record: bytes | None) -> None:
    """Change a record as no tool of ours would."""
    with lmdb.open(str(folder), max_dbs=6) as environment:
        dbi = environment.open_db(database)
        with environment.begin(write=True) as transaction:
            if record is None:
                transaction.delete(key, db=dbi)
            else:
                transaction.put(key, record, db=dbi)


def read(folder: Path, database: bytes, key: bytes) -> bytes:
    with lmdb.open(str(folder), max_dbs=6) as environment:
        dbi = environment.open_db(database)
        with environment.begin() as transaction:
            record = transaction.get(key, db=dbi)
            assert record is not None
            return bytes(record)


def refusal(tmp_path: Path, site: Site, authority: Authority, **options: object) -> str:
    """See that a broker does not start, and return why."""
    gateway = Gateway(tmp_path, site, authority, listeners=("plain",), **options)  # type: ignore[arg-type]
    try:
        return gateway.refuses_to_start()
    finally:
        gateway.kill()


def _absent(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _empty(folder: Path) -> None:
    _absent(folder)
    folder.mkdir()


def _cut(folder: Path) -> None:
    size = (folder / "data.mdb").stat().st_size
    os.truncate(folder / "data.mdb", size - 4096)


def _cut_to_nothing(folder: Path) -> None:
    os.truncate(folder / "data.mdb", 0)


def _cut_to_its_head(folder: Path) -> None:
    os.truncate(folder / "data.mdb", 8192)


def _foreign(folder: Path) -> None:
    (folder / "data.mdb").write_bytes(os.urandom(65536))


def _other_environment(folder: Path) -> None:
    _empty(folder)
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"a", b"b")


def _no_meta(folder: Path) -> None:
    write(folder, b"meta", b"meta", None)


def _other_magic(folder: Path) -> None:
    write(folder, b"meta", b"meta", b"X" + read(folder, b"meta", b"meta")[1:])


def _other_layout(folder: Path) -> None:
    meta = read(folder, b"meta", b"meta")
    write(folder, b"meta", b"meta", meta[:8] + struct.pack("<I", LAYOUT + 1) + meta[12:])


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (_absent, "there is no store"),
        (_empty, "there is no store"),
        (_cut, "shorter than what is in it"),
        (_cut_to_nothing, "cannot be"),
        (_cut_to_its_head, "shorter than what is in it"),
        (_foreign, "cannot be opened"),
        (_other_environment, "cannot be read"),
        (_no_meta, "not bednet's"),
        (_other_magic, "not bednet's"),
        (_other_layout, f"has layout {LAYOUT + 1}, and this plugin reads layout {LAYOUT}"),
    ],
)
def test_the_broker_does_not_start_without_a_sound_store(
    tmp_path: Path, site: Site, authority: Authority, harm: Callable[[Path], None], word: str
) -> None:
    harm(site.folder)
    log = refusal(tmp_path, site, authority)
    line = next(line for line in log.splitlines() if "Error: bednet:" in line)
    assert word in line
    assert not (site.folder / "data.mdb").exists() or harm is not _empty


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"stroe": "/x"}, "there is no option plugin_opt_stroe"),
        ({"store": "relative/path"}, "plugin_opt_store cannot be 'relative/path'"),
        ({"audit_rate": "0"}, "plugin_opt_audit_rate cannot be '0'"),
        ({"audit_rate": "10x"}, "plugin_opt_audit_rate cannot be '10x'"),
        ({"login_failures": "99999999999999"}, "plugin_opt_login_failures cannot be"),
        ({"login_failures": "-1"}, "plugin_opt_login_failures cannot be '-1'"),
    ],
)
def test_an_option_that_is_none_stops_the_broker(
    tmp_path: Path, site: Site, authority: Authority, options: dict[str, str], word: str
) -> None:
    assert word in refusal(tmp_path, site, authority, options=options)


def test_it_is_loaded_once(tmp_path: Path, site: Site, authority: Authority) -> None:
    """LMDB must not be opened twice by one process, and two listeners would load it twice."""
    gateway = Gateway(tmp_path, site, authority, listeners=("plain", "password"), per_listener=True)
    try:
        assert "loaded a second time" in gateway.refuses_to_start()
    finally:
        gateway.kill()


def test_a_broker_that_does_not_tick_lets_nobody_in(site: Site, start: Start) -> None:
    """Mosquitto 2.0.11 never ticks with per_listener_settings: no revocation would be kept, no end either."""
    gateway = start(listeners=("plain",), per_listener=True)
    if broker_version() < (2, 0, 15):
        gateway.refused(gateway.credentials("temp-1"), on="plain", client_id="temp-1")
        gateway.audited(event="refused", action="connect", reason="internal")
    else:
        gateway.admitted(gateway.credentials("temp-1"), on="plain", client_id="temp-1")


# --- while the broker runs


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\x01",
        b"\x02" + bytes(20),
        b"\x01\xff" + bytes(18),
        b"\x01\x02\x00\xff" + bytes(16),
        b"\x01\x02\x00\x00" + bytes(17),
    ],
)
def test_a_device_whose_record_does_not_parse_is_refused(
    site: Site, gateway: Gateway, authority: Authority, record: bytes
) -> None:
    with gateway.session("temp-2", authority.device("temp-2")) as other:
        write(site.folder, b"devices", b"temp-1", record)
        gateway.refused(authority.device("temp-1").credentials, client_id="temp-1")
        gateway.audited(reason="store", device="temp-1")
        assert other.publish("sensors/temp-2/t", b"1").granted


@pytest.mark.parametrize("record", [None, b"", b"\x01\x00\xff\xff", b"\x01\x00\x01\x00" + b"\xff" * 8])
def test_a_profile_that_does_not_parse_grants_nothing(
    site: Site, gateway: Gateway, authority: Authority, record: bytes | None
) -> None:
    key = site.store.get("temp-1")
    assert key is not None
    write(site.folder, b"profiles", key.profile, record)
    gateway.refused(authority.device("temp-1").credentials, client_id="temp-1")
    gateway.audited(reason="store", device="temp-1")


def test_what_a_damaged_record_of_a_connected_device_denies(site: Site, gateway: Gateway) -> None:
    """As soon as the change log says that it changed; who is connected goes."""
    with gateway.session("temp-1", on="plain") as session:
        last = int.from_bytes(read(site.folder, b"meta", b"meta")[16:24], "little")
        write(site.folder, b"changes", (last + 1).to_bytes(8, "big"), b"\x01temp-1")
        write(site.folder, b"devices", b"temp-1", b"\x01")
        meta = read(site.folder, b"meta", b"meta")
        write(site.folder, b"meta", b"meta", meta[:16] + (last + 1).to_bytes(8, "little") + meta[24:])
        session.wait_goodbye()
    gateway.audited(event="disconnected", device="temp-1", reason="store")


def test_a_change_log_with_gaps_is_no_list_of_changes(site: Site, gateway: Gateway) -> None:
    """Then everything may have changed, and everything is read again."""
    with gateway.session("temp-1", on="plain") as session:
        write(site.folder, b"devices", b"temp-1", None)
        meta = read(site.folder, b"meta", b"meta")
        last = int.from_bytes(meta[16:24], "little")
        write(site.folder, b"meta", b"meta", meta[:16] + (last + 3).to_bytes(8, "little") + meta[24:])
        session.wait_goodbye()
    gateway.audited(event="disconnected", device="temp-1", reason="unknown-device")


def test_another_layout_leaves_what_was_read_and_grants_nothing_new(
    site: Site, gateway: Gateway, authority: Authority
) -> None:
    with gateway.session("temp-1", on="plain") as session:
        _other_layout(site.folder)
        gateway.wait(lambda: "the store cannot be read" in gateway.text(), "the complaint")
        assert session.publish("sensors/temp-1/t", b"1").granted
        gateway.refused(authority.device("temp-2").credentials, client_id="temp-2")
        gateway.audited(reason="store", device="temp-2")
        meta = read(site.folder, b"meta", b"meta")
        write(site.folder, b"meta", b"meta", meta[:8] + struct.pack("<I", LAYOUT) + meta[12:])
        gateway.admitted(authority.device("temp-2").credentials, client_id="temp-2")
        assert session.publish("sensors/temp-1/t", b"1").granted


def test_a_zone_that_is_not_there_denies(site: Site, gateway: Gateway) -> None:
    site.zones["Test/Here"] = [(-62135596800, 0)]
    always = {"days": 127, "from": 0, "to": 86400, "zone": "Test/Here"}
    site.profiles["sensor"] = [allow("publish", "sensors/#", during=[always])]
    site.apply()
    with gateway.session("temp-1", on="plain") as session:
        assert session.publish("sensors/x", b"1").granted
    with lmdb.open(str(site.folder), max_dbs=6) as environment:
        zones = environment.open_db(b"zones")
        with environment.begin(write=True) as transaction:
            transaction.drop(zones, delete=False)
    site.apply()
    assert site.apply()["changed"] is False
    with lmdb.open(str(site.folder), max_dbs=6) as environment:
        zones = environment.open_db(b"zones")
        with environment.begin(write=True) as transaction:
            transaction.drop(zones, delete=False)
            meta_db = environment.open_db(b"meta", txn=transaction)
            meta = transaction.get(b"meta", db=meta_db)
            assert meta is not None
            last = int.from_bytes(meta[16:24], "little") + 5
            transaction.put(b"meta", meta[:16] + last.to_bytes(8, "little") + meta[24:], db=meta_db)
    with gateway.session("temp-1", on="plain") as session:
        assert not session.publish("sensors/x", b"1").granted
    gateway.audited(topic="sensors/x", reason="store")


def test_the_store_may_grow_beyond_the_map_that_the_broker_has(site: Site, start: Start, tmp_path: Path) -> None:
    site.folder, site.map_size = tmp_path / "small", 1 << 18
    site.apply()
    gateway = start(listeners=("plain",))
    with gateway.session("temp-1", on="plain") as session:
        for number in range(10000):
            site.add(f"more-{number:05}")
        site.apply()
        assert (site.folder / "data.mdb").stat().st_size > 1 << 18
        assert session.publish("sensors/temp-1/t", b"1").granted
        site.store.revoke("temp-1", "superseded")
        session.wait_goodbye()
    gateway.audited(event="disconnected", device="temp-1", reason="revoked")


def test_the_broker_runs_as_a_user_that_cannot_write_the_store(site: Site, start: Start) -> None:
    """It needs to write lock.mdb, and nothing else; data.mdb is read-only for it."""
    gateway = start(listeners=("plain",))
    before = (site.folder / "data.mdb").read_bytes()
    with gateway.session("temp-1", on="plain") as session:
        assert session.publish("sensors/temp-1/t", b"1").granted
    gateway.refused(gateway.credentials("temp-9"), on="plain", client_id="temp-9")
    assert (site.folder / "data.mdb").read_bytes() == before
    with open(f"/proc/{gateway.pid}/maps", encoding="utf-8") as maps:
        modes = {line.split()[1] for line in maps if "data.mdb" in line}
    assert modes == {"r--s"}
