# SPDX-License-Identifier: Apache-2.0
"""Write the table of variables into each role's README.md, from its meta/argument_specs.yml.

``python docs/generate_role_docs.py`` writes what is out of date and names it; ``tests/unit/test_role_specs.py`` refuses
a table that was not written again. Only what lies between the two markers is touched.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- variables: written by `make docs` from meta/argument_specs.yml -->"
END = "<!-- end of variables -->"


def options(role: Path) -> dict[str, dict[str, Any]]:
    """Return the variables of a role, each with its attributes, in the order of the spec."""
    spec = yaml.safe_load((role / "meta/argument_specs.yml").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = spec["argument_specs"]["main"]["options"]
    return found


def _plain(text: str) -> str:
    """Turn Ansible's markup into Markdown that stays inside one cell."""
    return re.sub(r"O\(([^)]*)\)", r"`\1`", " ".join(text.split())).replace("|", "\\|")


def _value(value: object) -> str:
    if isinstance(value, list) and value:
        return "<br>".join(f"`{item}`" for item in value)
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def _default(attributes: dict[str, Any]) -> str:
    if attributes.get("required"):
        return "none: must be set"
    return _value(attributes["default"]) if "default" in attributes else "see text"


def _row(name: str, attributes: dict[str, Any]) -> str:
    kind = attributes["type"] + (f" of {attributes['elements']}" if "elements" in attributes else "")
    meaning = [_plain(sentence) for sentence in attributes["description"]]
    if "choices" in attributes:
        meaning.append(f"One of {', '.join(f'`{choice}`' for choice in attributes['choices'])}.")
    return f"| `{name}` | {kind} | {_default(attributes)} | {' '.join(meaning)} |"


def table(role: Path) -> str:
    """Return the whole block, markers included."""
    rows = [_row(name, attributes) for name, attributes in options(role).items()]
    return "\n".join([BEGIN, "", "| variable | type | default | meaning |", "|---|---|---|---|", *rows, "", END])


def rewritten(role: Path) -> str:
    """Return the role's README.md with its block brought up to date.

    :raises ValueError: when README.md does not have the two markers, once each and in this order.
    """
    readme = (role / "README.md").read_text(encoding="utf-8")
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after or END in after:
        raise ValueError(f"{role / 'README.md'} must have the lines {BEGIN!r} and {END!r}, once each, in this order")
    return before + table(role) + after


def roles() -> list[Path]:
    """Return the folders of all roles."""
    return sorted(path.parents[1] for path in ROOT.glob("roles/*/tasks/main.yml"))


def main() -> int:
    """Write what is out of date."""
    for role in roles():
        text = rewritten(role)
        path = role / "README.md"
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"wrote {path.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
