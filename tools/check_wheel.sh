#!/usr/bin/env bash
# check_wheel.sh pip|uv [WORK]: builds the wheel, installs it with what it needs into an empty environment by one of the
# two, as a user would, and runs the quickstart there on the tests' tiny models. WORK (default: a new folder in /tmp)
# holds all of it, 2 GB and more.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
installer=${1:?pip or uv}
work=${2:-$(mktemp -d)}/wheel-$installer
export EXPO_INSTALLER=$installer
source "$root/tools/environment.sh"
make_environment # of the tests: it has uv, hatchling and the tiny models' trainer
has_modules hatchling pytest || { take_pip_settings && pip_install -e "$root[test]"; }
inputs=$(cd "$root" && OMP_NUM_THREADS=1 python -c 'from tests.made_inputs import made; print(made().models)')
rm -rf "$work" && mkdir -p "$work"
(cd "$root" && python -m hatchling build -t wheel -d "$work/dist")

venv=$work/venv
make_venv "$(command -v python)"
install_torch # the CPU build where there is no GPU, as docs say
say "installing the wheel with $installer"
pip_install "$work"/dist/*.whl
unset PYTHONPATH
cd "$work"
pair=(--sft "$inputs/tiny-sft" --dpo "$inputs/tiny-dpo")
"$venv/bin/expo" --version
"$venv/bin/expo" recipes >/dev/null
"$venv/bin/expo" inspect "${pair[@]}"
"$venv/bin/expo" extrapolate "${pair[@]}" --alpha 0.3
printf '{"prompt": "please describe the %s"}\n' river cat house tree >prompts.jsonl
"$venv/bin/expo" sweep "${pair[@]}" --reward-model "$inputs/tiny-rm" --task prompts.jsonl --alpha 1 \
    --limit 4 --max-tokens 8 --engine transformers --output swept
"$venv/bin/python" -I -c 'import expo; assert "site-packages" in expo.__file__, expo.__file__'
