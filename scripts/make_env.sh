# shellcheck shell=bash
# Sourced by run_train.sh and scripts/run_tests.sh: find_or_make_env sets PYTHON to a Python that has everything needed.
#
# The active Python is taken if it fits; else the .venv beside pyproject.toml, which is made, mended or updated first where
# that is needed. What is needed is read from pyproject.toml; the versions that go into a .venv are those of constraints.txt.
# bash 3.2 (macOS) must be able to run this file.

# Prints the requirements of pyproject.toml, after one line with the path of the Python that runs it: all of them, or with
# "missing" those that are not installed. Packages are looked up by their metadata and not imported: importing torch alone
# takes seconds. Exit code 3: this Python is too old. Knows only requirements of the form name[extra]>=version; marker.
REQUIREMENTS_PY='
import re, sys
if sys.version_info < (3, 10):
    sys.exit(3)
from importlib import metadata

def numbers(version):
    return [int(part) for part in re.findall(r"\d+", version)[:3]]

def installed(requirement):
    name, minimum = re.match(r"([\w.-]+)(?:\[.*?\])?(?:>=([\d.]+))?", requirement).groups()
    older_than = re.search(r"python_version < .(\d+)\.(\d+)", requirement)
    if older_than and sys.version_info >= tuple(map(int, older_than.groups())):
        return True
    try:
        return numbers(metadata.version(name)) >= numbers(minimum or "0")
    except metadata.PackageNotFoundError:
        return False

mode, path, extra = sys.argv[1:]
print(sys.executable)
wanted = False
for line in open(path, encoding="utf-8"):
    start = re.match(r"([\w-]+) = \[\s*$", line)
    if start:
        wanted = start.group(1) in ("dependencies", extra)
    elif line.startswith("]"):
        wanted = False
    requirement = re.match(r"\s+\"(.+?)\",", line)
    if wanted and requirement and (mode == "all" or not installed(requirement.group(1))):
        print(requirement.group(1))
'

LOCK_PY='
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("waiting: another process is making .venv", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
'

# Threads that wait for each other spin only briefly: alone a run is as fast, and beside another program that computes it is not
# slowed down sixteenfold (docs/parallelism.md). Read by GNU's OpenMP, which torch uses on Linux, when torch is loaded.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}

# find_or_make_env REPO [EXTRA]: sets PYTHON. EXTRA is a list of pyproject.toml's optional dependencies, such as dev.
find_or_make_env() {
    local repo=$1 extra=${2:-core} answer="" base="" candidate
    for candidate in python3 python python3.14 python3.13 python3.12 python3.11 python3.10; do
        if answer=$("$candidate" -c "$REQUIREMENTS_PY" missing "$repo/pyproject.toml" "$extra" 2>/dev/null); then
            base=${answer%%$'\n'*}
            break
        fi
    done
    if [ -z "$base" ]; then
        echo "tunelib needs Python 3.10 or newer, and found none on PATH" >&2
        return 1
    fi
    if [ "$answer" = "$base" ]; then # nothing is missing
        PYTHON=$base
        return
    fi

    local venv=$repo/.venv
    PYTHON=$venv/bin/python
    venv_fits "$repo" "$extra" && return
    exec 9>>"$repo/pyproject.toml" # a lock on a file that is there anyway: it ends with its process and leaves nothing behind
    "$base" -c "$LOCK_PY"
    if ! venv_fits "$repo" "$extra"; then
        echo "$base lacks $(echo "$answer" | sed -n '2,$s/[^A-Za-z0-9._-].*//p' | paste -s -d ' ' -): making $venv with everything needed" >&2
        make_venv "$repo" "$extra" "$base" >&2 || return 1
    fi
    exec 9>&-
}

# Whether REPO/.venv has what is wanted: made by make_venv from the files as they are now, or made by hand and sufficient.
venv_fits() {
    local repo=$1 extra=$2 venv=$1/.venv
    [ -x "$venv/bin/python" ] || return 1
    if [ -f "$venv/tunelib-installed" ]; then
        grep -qx "$extra $(env_checksum "$repo" "$extra")" "$venv/tunelib-installed"
    else
        [ "$("$venv/bin/python" -c "$REQUIREMENTS_PY" missing "$repo/pyproject.toml" "$extra" | wc -l)" -eq 1 ]
    fi
}

# A number that changes when the requirements or the pinned versions do.
env_checksum() {
    { "$1/.venv/bin/python" -c "$REQUIREMENTS_PY" all "$1/pyproject.toml" "$2" | sed 1d && cat "$1/constraints.txt"; } | cksum | cut -d ' ' -f 1
}

# The marker says "unfinished" until the last package is in: a .venv whose making was interrupted is made anew.
make_venv() {
    local repo=$1 extra=$2 base=$3 venv=$1/.venv torch
    local marker=$venv/tunelib-installed requirements=$venv/tunelib-requirements.txt
    if ! "$venv/bin/python" -c "" 2>/dev/null || grep -qx unfinished "$marker" 2>/dev/null; then
        "$base" -m venv --clear "$venv" || return 1
    fi
    echo unfinished >"$marker"
    "$venv/bin/python" -c "$REQUIREMENTS_PY" all "$repo/pyproject.toml" "$extra" | sed 1d >"$requirements"
    torch=$(sed -n 's/^\(torch==[^ ;]*\).*/\1/p' "$repo/constraints.txt")
    # torch first and alone: with its exact version known, pip looks at no other of its large builds
    "$venv/bin/python" -m pip install --disable-pip-version-check "$torch" || return 1
    "$venv/bin/python" -m pip install --disable-pip-version-check -q -c "$repo/constraints.txt" -r "$requirements" || return 1
    for extra in core ${extra/#core/}; do # what has dev has core
        echo "$extra $(env_checksum "$repo" "$extra")"
    done >"$marker.new"
    mv "$marker.new" "$marker"
}
