# SPDX-License-Identifier: Apache-2.0
"""What a role says about its variables is the same in defaults, argument spec, tasks and README.

The sharp edges: a default that was changed in one place only, a variable that the tasks read and nobody documented, a
README table that was not written again, and an argument check that prints the root key's passphrase.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bednet import ca, site
from bednet.verify.task import Gateway

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(path.parents[1] for path in ROOT.glob("roles/*/tasks/main.yml"))
# Set by the operator for the whole site, and given a meaning by several roles: no role's defaults may hold them.
SITE_WIDE = {"bednet_domain", "bednet_no_log"}
TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "path": (str,),
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "list": (list,),
}
every_role = pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate_role_docs", ROOT / "docs/generate_role_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docs = _generator()


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _spec(role: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = docs.options(role)
    return found


def _defaults(role: Path) -> dict[str, Any]:
    found: dict[str, Any] = _yaml(role / "defaults/main.yml")
    return found


def _is_computed(value: object) -> bool:
    return "{{" in json.dumps(value)


def _set_as_facts(data: object) -> set[str]:
    if isinstance(data, list):
        return {name for item in data for name in _set_as_facts(item)}
    if isinstance(data, dict):
        facts = data.get("ansible.builtin.set_fact")
        mine = set(facts) if isinstance(facts, dict) else set()
        return mine | {name for value in data.values() for name in _set_as_facts(value)}
    return set()


def test_every_role_is_looked_at() -> None:
    assert [role.name for role in ROLES] == [
        "ca",
        "enrolment",
        "load_generator",
        "mosquitto",
        "token_service",
        "verification",
    ]
    assert docs.roles() == ROLES


@every_role
def test_spec_names_every_default(role: Path) -> None:
    assert set(_defaults(role)) - set(_spec(role)) == set(), "in defaults/main.yml, but not in meta/argument_specs.yml"


@every_role
def test_what_has_no_default_is_explained_in_the_spec(role: Path) -> None:
    for name in set(_spec(role)) - set(_defaults(role)) - SITE_WIDE:
        attributes = _spec(role)[name]
        assert "default" not in attributes, f"{name} has a default in the spec, and none in defaults/main.yml"
        assert attributes.get("required") or attributes["description"][-1].startswith("By default "), name


@every_role
def test_defaults_and_spec_have_the_same_values(role: Path) -> None:
    defaults, spec = _defaults(role), _spec(role)
    plain = {name: value for name, value in defaults.items() if not _is_computed(value)}
    assert {name: spec[name].get("default", "(none)") for name in plain} == plain
    for name, value in plain.items():
        # In Python 1 is True and 1.0, in YAML they are three things.
        assert isinstance(value, bool) == (spec[name]["type"] == "bool"), name


@every_role
def test_a_computed_default_is_told_in_words(role: Path) -> None:
    for name, value in _defaults(role).items():
        if _is_computed(value):
            assert "default" not in _spec(role)[name], f"{name} is computed; the spec cannot know its value"
            assert _spec(role)[name]["description"][-1].startswith("By default "), name


@every_role
def test_each_variable_is_described_by_full_sentences_and_a_type(role: Path) -> None:
    for name, attributes in _spec(role).items():
        assert attributes["type"] in TYPES, name
        assert (attributes["type"] == "list") == ("elements" in attributes), name
        for sentence in attributes["description"]:
            assert re.fullmatch(r"[A-Z].*\.", sentence.strip(), re.DOTALL), f"{name}: {sentence!r} is no full sentence"
        if "default" in attributes:
            assert isinstance(attributes["default"], TYPES[attributes["type"]]), name
            assert attributes["default"] in attributes.get("choices", [attributes["default"]]), name
        assert not (attributes.get("required") and "default" in attributes), name


@every_role
def test_every_variable_that_the_role_reads_is_in_a_spec(role: Path) -> None:
    """A public name in a task or template is a fact that a role sets, a tag, or a variable that a spec documents."""
    names = "|".join(other.name for other in ROLES)
    word = re.compile(rf"(?<![\w/-])(?:{names})_[a-z0-9_]+\b")
    facts = {name for other in ROLES for path in other.glob("tasks/*.yml") for name in _set_as_facts(_yaml(path))}
    tags = {f"{other.name}_{step}" for other in ROLES for step in ("install", "configure", "run")}
    documented = {name for other in ROLES for name in _spec(other)}
    files = [
        path for folder in ("tasks", "handlers", "vars", "defaults", "templates") for path in role.glob(f"{folder}/*")
    ]
    for path in files:
        text = re.sub(r"^\s*#.*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        unknown = set(word.findall(text)) - documented - facts - tags
        assert not unknown, f"{path.relative_to(ROOT)} reads what no meta/argument_specs.yml names"


@every_role
def test_secrets_are_hidden_unless_the_operator_says_otherwise(role: Path) -> None:
    """bednet_no_log is the one switch, and true is its default wherever it is read."""
    if "bednet_no_log" in _spec(role):
        assert _spec(role)["bednet_no_log"]["default"] is True
    else:
        # It handles no secret at all.
        assert role.name == "load_generator"
    for path in role.glob("tasks/*.yml"):
        for expression in re.findall(r"^\s*no_log: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert expression == '"{{ bednet_no_log | default(true) }}"', path.relative_to(ROOT)


def test_passphrase_and_password_are_marked_as_secrets() -> None:
    assert [
        (role.name, name) for role in ROLES for name, attributes in _spec(role).items() if attributes.get("no_log")
    ] == [("ca", "ca_root_passphrase"), ("token_service", "token_service_database_password")]


@every_role
def test_readme_shows_the_table_of_the_spec(role: Path) -> None:
    readme = (role / "README.md").read_text(encoding="utf-8")
    assert docs.rewritten(role) == readme, "out of date; cure: make docs"
    for name in _spec(role):
        assert f"| `{name}` |" in readme


def test_generator_refuses_a_readme_without_its_markers(tmp_path: Path) -> None:
    role = tmp_path / "roles/ca"
    (role / "meta").mkdir(parents=True)
    (role / "meta/argument_specs.yml").write_bytes((ROOT / "roles/ca/meta/argument_specs.yml").read_bytes())
    for text in ("# ca\n", f"{docs.END}\n{docs.BEGIN}\n", f"{docs.BEGIN}\n{docs.END}\n{docs.END}\n"):
        (role / "README.md").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="once each, in this order"):
            docs.rewritten(role)


# --- what had to be written down twice


def test_gateways_are_described_with_the_defaults_of_the_roles() -> None:
    """describe.yml speaks of hosts outside the play too, for which no role's defaults are loaded: it repeats them."""
    text = (ROOT / "roles/mosquitto/tasks/describe.yml").read_text(encoding="utf-8")
    defaults = {**_defaults(ROOT / "roles/ca"), **_defaults(ROOT / "roles/mosquitto")}
    found = {
        name: yaml.safe_load(value)
        for name, value in re.findall(r"\.((?:ca|mosquitto)_\w+)\s*\| default\((\d+|true|false|'[^']*')\)", text)
    }
    # Those that are computed read other variables, and are compared by the lab's tests.
    computed = {"mosquitto_address", "mosquitto_server_dns", "ca_publish_address"}
    assert set(re.findall(r"\.((?:ca|mosquitto)_\w+)", text)) - computed == set(found)
    assert found == {name: defaults[name] for name in found}
    for name in computed & set(defaults):
        assert _is_computed(defaults[name])
    described = {"mosquitto_mtls_port", "mosquitto_password_port", "mosquitto_psk_port", "mosquitto_websockets_port"}
    assert described | {"mosquitto_tls_minimum", "mosquitto_max_packet_size_bytes", "ca_publish_port"} <= set(found)


def test_verify_expects_of_a_gateway_what_the_role_makes_of_one_by_default() -> None:
    defaults = _defaults(ROOT / "roles/mosquitto")
    expected = Gateway("gateway-1", "192.0.2.1", "gateway-1.plant.example")
    versions = ("1.2", "1.3")
    assert expected.mtls_port == defaults["mosquitto_mtls_port"]
    assert expected.password_port == (defaults["mosquitto_password_port"] or None)
    assert expected.psk_port == (defaults["mosquitto_psk_port"] or None)
    assert expected.access_control == defaults["mosquitto_access_control"]
    assert expected.websockets_port == (defaults["mosquitto_websockets_port"] or None)
    assert expected.max_packet_size == defaults["mosquitto_max_packet_size_bytes"]
    assert expected.tls_versions == versions[versions.index(defaults["mosquitto_tls_minimum"]) :]


def test_everybody_means_the_same_by_a_key_type() -> None:
    of_ca = _yaml(ROOT / "roles/ca/vars/main.yml")["__ca_key_types"]
    assert _yaml(ROOT / "roles/mosquitto/vars/main.yml")["__mosquitto_key_types"] == of_ca
    assert tuple(of_ca) == ca.KEY_TYPES == site.KEY_TYPES
    schema = json.loads((ROOT / "src/bednet/schemas/devices.schema.json").read_text(encoding="utf-8"))
    assert [tuple(names) for names in _enumerations(schema, "P-256")] == [ca.KEY_TYPES]
    for role, name in (("ca", "ca_key_type"), ("mosquitto", "mosquitto_key_type"), ("enrolment", "enrolment_key_type")):
        assert tuple(_spec(ROOT / "roles" / role)[name]["choices"]) == ca.KEY_TYPES, name


def _enumerations(schema: object, member: str) -> list[list[str]]:
    """Return each `enum` of a JSON schema that has this member."""
    if isinstance(schema, list):
        return [found for item in schema for found in _enumerations(item, member)]
    if not isinstance(schema, dict):
        return []
    mine = [schema["enum"]] if member in schema.get("enum", []) else []
    return mine + [found for value in schema.values() for found in _enumerations(value, member)]


PASSPHRASE = "three-blind-mice-and-a-farmer"  # noqa: S105  (opens nothing)


def _validate(folder: Path, variables: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run nothing of the roles but Ansible's own check of their arguments, as talkative as it gets."""
    tasks = [{"ansible.builtin.import_role": {"name": role.name}, "tags": ["never"]} for role in ROLES]
    plays = [{"hosts": "all", "become": False, "gather_facts": False, "tasks": tasks}]
    (folder / "validate.yml").write_text(yaml.safe_dump(plays), encoding="utf-8")
    facts = {"user_id": "somebody", "user_gid": 1000}
    hosts = {"ansible_connection": "local", "ansible_facts": facts, **variables}
    inventory = {"all": {"hosts": {"gateway-1": hosts}}}
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory), encoding="utf-8")
    return subprocess.run(
        [
            Path(sys.executable).with_name("ansible-playbook"),
            "-vvv",
            "-i",
            "hosts.yml",
            "--tags",
            "always",
            "validate.yml",
        ],
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "ANSIBLE_HOME": str(folder / "ansible"),
            "ANSIBLE_ROLES_PATH": str(ROOT / "roles"),
            "ANSIBLE_NOCOLOR": "1",
            "LC_ALL": "C.UTF-8",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_specs_accept_the_defaults_and_numbers_written_as_text(tmp_path: Path) -> None:
    """Templates and -e hand numbers over as text, and the tests use certificates that live for a part of a day."""
    done = _validate(
        tmp_path,
        {
            "bednet_domain": "plant.example",
            "ca_root_passphrase": PASSPHRASE,
            "ca_publish_port": "8880",
            "ca_crl_validity_days": "0.5",
            "ca_device_validity_days": 0.25,
            "mosquitto_websockets_port": "9001",
            "mosquitto_renew_before_days": "0.1",
            "enrolment_revoke_at_most": "7",
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Validating arguments against arg spec") == len(ROLES)
    assert PASSPHRASE not in done.stdout + done.stderr


def test_specs_refuse_other_values_and_keep_the_passphrase_to_themselves(tmp_path: Path) -> None:
    done = _validate(
        tmp_path,
        {
            "bednet_domain": "plant.example",
            # Not text: whatever goes wrong with it, it must not be shown.
            "ca_root_passphrase": [PASSPHRASE, {"again": PASSPHRASE}],
            "ca_key_type": "DSA-1024",
            "ca_publish_port": "8880x",
        },
    )
    assert done.returncode != 0
    assert "ca_key_type" in done.stdout
    assert "DSA-1024" in done.stdout
    assert "argument 'ca_publish_port' is of type str and we were unable to convert to int" in done.stdout
    assert PASSPHRASE not in done.stdout + done.stderr
