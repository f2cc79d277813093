#!/usr/bin/env bash
# Test: ./scripts/run_tests.sh [words for pytest]
#
# Without words: the linter, the formatter's check, the type checker and the fast tests. With words: pytest alone, from the
# repository's root, such as ./scripts/run_tests.sh -m slow or ./scripts/run_tests.sh tests/unit -k packing
set -euo pipefail
REPO=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$REPO"
. scripts/make_env.sh
find_or_make_env "$REPO" dev
export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}

if [ $# -gt 0 ]; then
    exec "$PYTHON" -m pytest "$@"
fi
status=0
check() {
    echo "== $*"
    "$PYTHON" -m "$@" || status=1
}
check ruff check .
check ruff format --check .
types=$(mktemp)
"$PYTHON" -m mypy >"$types" 2>&1 &  # a minute of one core, beside tests that wait for processes
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} check pytest -n 2 --dist loadfile  # two at a time, of one thread
wait $! || status=1
echo "== mypy"
cat "$types"
rm "$types"
exit $status
