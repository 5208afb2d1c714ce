# Sourced by demo/run.sh and tests/run.sh: makes .venv with expo in it, once, and puts it first on PATH.
# PYTHON chooses the interpreter (3.11 or later), EXPO_VENV the folder. Nothing outside that folder is changed.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${EXPO_VENV:-$root/.venv}

say() { echo "== $*" >&2; }

find_python() {
    local name
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "expo needs Python 3.11 or later with venv; set PYTHON to one" >&2
    return 1
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# What is imported is compiled then, and kept; to compile all 26,000 files that vLLM brings along would take minutes.
unset PYTHONDONTWRITEBYTECODE
pip_install() {
    "$venv/bin/python" -m pip install -qq --no-compile --disable-pip-version-check -c "$root/tools/constraints.txt" "$@"
}

# The CPU build where there is no GPU: the plain one would bring gigabytes of CUDA along on Linux.
install_torch() {
    local wanted
    wanted=$(grep '^torch==' "$root/tools/constraints.txt")
    if has_gpu || [ "$(uname -s)" != Linux ]; then
        pip_install "$wanted"
    else
        pip_install "$wanted+cpu" 2>/dev/null ||
            pip_install "$wanted" --index-url https://download.pytorch.org/whl/cpu
    fi
}

make_environment() {
    local python
    if [ ! -x "$venv/bin/expo" ]; then
        python=$(find_python) || return 1
        say "making $venv with $("$python" --version) (a few minutes, about 2 GB)"
        "$python" -m venv "$venv" || return 1
        install_torch || return 1
        pip_install -e "$root" || return 1
    fi
    export PATH="$venv/bin:$PATH"
}
