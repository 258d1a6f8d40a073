#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Make the Python environment of this checkout from requirements.lock: bootstrap.sh PYTHON FOLDER
# The stamp (a copy of requirements.lock) is written last: an interrupted bootstrap is done again from the start.
set -euo pipefail
python=$1 venv=$2
state=.bednet

if ! command -v "$python" >/dev/null; then
    echo "bednet needs Python 3.11 or newer, and there is no \`$python\` here." >&2
    echo "What to do: install it (Debian or Ubuntu: apt-get install python3 python3-venv), or name another: make PYTHON=..." >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "bednet needs Python 3.11 or newer; \`$python\` is $("$python" -V 2>&1)." >&2
    echo "What to do: name a newer one: make PYTHON=python3.12" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "==> Installing python3-venv"
        mkdir -p "$state"
        dpkg-query -W -f '${binary:Package}\n' | sort >"$state/packages.before"
        export DEBIAN_FRONTEND=noninteractive
        apt-get install --yes --no-install-recommends python3-venv >"$state/apt.log" 2>&1 ||
            { apt-get update && apt-get install --yes --no-install-recommends python3-venv; } >"$state/apt.log" 2>&1 ||
            { tail -n 20 "$state/apt.log" >&2; echo "What to do: install python3-venv by hand, then try again." >&2; exit 1; }
        # What was not there before: `make purge` removes exactly this.
        dpkg-query -W -f '${binary:Package}\n' | sort | comm -13 "$state/packages.before" - >>"$state/bootstrap-packages"
        rm -f "$state/packages.before" "$state/apt.log"
    else
        echo "Python's venv module is not installed for \`$python\`." >&2
        echo "What to do: install it (Debian or Ubuntu: apt-get install python3-venv), then try again." >&2
        exit 1
    fi
fi

begin=$SECONDS
echo "==> Python environment in $venv (the first time takes a minute or two)"
rm -f "$venv/requirements.lock"
"$python" -m venv --clear "$venv"
total=$(grep -c '^[a-z].*==' requirements.lock)
echo "    installing $total pinned packages"
log=$(mktemp -p "$venv")
# Compiling everything takes longer than what is used ever gains.
if ! "$venv/bin/pip" install --no-compile --require-hashes -r requirements.lock 2>&1 | tee "$log" |
    awk -v total="$total" '/^Collecting/ && ++n % 20 == 0 { print "    fetched " n " of " total; fflush() }
                           /^Installing collected/ { print "    unpacking"; fflush() }'; then
    tail -n 25 "$log" >&2
    echo "What to do: see whether this machine reaches its Python package index, then run the same command again." >&2
    exit 1
fi
"$venv/bin/pip" install --quiet --no-compile --no-deps --no-build-isolation -e . >>"$log" 2>&1 || { tail -n 25 "$log" >&2; exit 1; }
rm -f "$log"
cp requirements.lock "$venv/requirements.lock"
echo "    done in $((SECONDS - begin)) s"
