# Sourced by demo/run.sh and tests/run.sh: makes .venv with expo in it, once, and puts it first on PATH.
# PYTHON chooses the interpreter (3.11 or later), EXPO_VENV the folder. Nothing outside that folder is changed. With uv
# on PATH it installs, else pip does.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${EXPO_VENV:-$root/.venv}
cpu_index=https://download.pytorch.org/whl/cpu

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

# uv reads its own settings only; where they are not made, those of pip hold.
if [ -n "${PIP_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}; fi
if [ -n "${PIP_FIND_LINKS:-}" ]; then export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS// /,}}; fi
has_uv() { command -v uv >/dev/null; }

make_venv() { # PYTHON; with pip in it, whoever makes it
    if has_uv; then uv venv -q --seed --allow-existing --python "$1" "$venv"; else "$1" -m venv "$venv"; fi
}

# What is imported is compiled then, and kept; to compile all 26,000 files that vLLM brings along would take minutes.
unset PYTHONDONTWRITEBYTECODE
pip_install() {
    local python=$venv/bin/python constraints=$root/tools/constraints.txt
    if has_uv; then
        uv pip install -q --no-compile-bytecode --python "$python" -c "$constraints" "$@"
    else
        "$python" -m pip install -qq --no-compile --disable-pip-version-check -c "$constraints" "$@"
    fi
}

# The CPU build where there is no GPU: the plain one would bring gigabytes of CUDA along on Linux.
install_torch() {
    local wanted
    wanted=$(grep '^torch==' "$root/tools/constraints.txt")
    if ! has_gpu && [ "$(uname -s)" = Linux ]; then
        pip_install "$wanted+cpu" 2>/dev/null && return
        pip_install "$wanted" --index-url "$cpu_index" 2>/dev/null && return
        say "$cpu_index cannot be reached, or has no $wanted: installing the plain wheel, which brings CUDA along"
    fi
    pip_install "$wanted"
}

make_environment() {
    local python
    if [ ! -x "$venv/bin/expo" ]; then
        python=$(find_python) || return 1
        say "making $venv with $("$python" --version) (a few minutes, about 2 GB)"
        make_venv "$python" || return 1
        install_torch || return 1
        pip_install -e "$root" || return 1
    fi
    export PATH="$venv/bin:$PATH"
}
