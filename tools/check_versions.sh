#!/usr/bin/env bash
# check_versions.sh oldest|newest [WORDS]: the tests without vLLM's, in an environment of their own, with Python 3.11 and
# the lowest versions that pyproject.toml allows, or with Python 3.13 and the highest. WORDS go to pytest. WORK (default: a
# new folder in /tmp) holds the environments, some 6 GB each; PYTHON_OLDEST and PYTHON_NEWEST name other interpreters.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/environment.sh
which=${1:?oldest or newest}
shift
work=${WORK:-$(mktemp -d)}
venv=$work/venv-$which

named() { # VERSION: an interpreter of it, from PATH or pyenv
    local python
    for python in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if "$python" -c '' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "no python$1 here; set PYTHON_OLDEST or PYTHON_NEWEST to one" >&2
    return 1
}

case $which in
    oldest) python=${PYTHON_OLDEST:-$(named 3.11)} ;;
    newest) python=${PYTHON_NEWEST:-$(named 3.13)} ;;
    *) echo "oldest or newest, not $which" >&2 && exit 2 ;;
esac
if [ ! -x "$venv/bin/pytest" ]; then
    say "making $venv with $("$python" --version) and the $which versions"
    make_venv "$python"
    has_uv || { echo "this needs uv, which knows the lowest versions" >&2 && exit 1; }
    constraints=/dev/null
    if [ "$which" = oldest ]; then
        pip_install --resolution lowest-direct -e '.[openai,peft]'
        # The tools that test are today's; AlpacaEval's wants an older setuptools than torch brings along.
        uv pip freeze -q --exclude-editable --python "$venv/bin/python" | grep -v '^setuptools==' >"$work/oldest.txt"
        constraints=$work/oldest.txt
    fi
    pip_install -e '.[test]'
else
    export PATH="$venv/bin:$PATH"
fi
python -m pip list --format freeze --disable-pip-version-check >"$work/$which-versions.txt"
export OMP_NUM_THREADS=1 EXPO_TEST_INPUTS=$work/inputs-$which
say "tests with $(python --version) and $(grep -cve '^-e' "$work/$which-versions.txt") packages, listed in $work/$which-versions.txt"
exec python -m pytest -n logical --maxprocesses 8 --dist loadgroup -m "not vllm" "$@"
