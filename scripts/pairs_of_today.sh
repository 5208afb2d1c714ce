#!/usr/bin/env bash
# Pairs of today, whose α nobody has published: `expo sweep` finds it, and writes its answers, rewards and verdict to
# sweeps/NAME. Without a name it lists the pairs and runs nothing. expo has to be on PATH (source .venv/bin/activate).
#   bash scripts/pairs_of_today.sh
#   LIMIT=100 bash scripts/pairs_of_today.sh OLMo-2-0425-1B-DPO SmolLM3-3B
# What can be set from outside: TASK (one), LIMIT, REWARD_MODEL and OUTPUT_DIR as in common.sh, and
#   SWEEP_ARGS   further flags, such as SWEEP_ARGS="--search race --with-sft --write"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

names=() sizes=()

# pair NAME SIZE
pair() {
    names+=("$1")
    sizes+=("$2")
}

# sweep NAME
sweep() {
    # shellcheck disable=SC2086 # the flags are several words
    go_on expo sweep --recipe "$1" --output "$OUTPUT_DIR/sweeps/$1" ${TASK:+--task "$TASK"} \
        ${LIMIT:+--limit "$LIMIT"} ${REWARD_MODEL:+--reward-model "$REWARD_MODEL"} ${SWEEP_ARGS:-}
}

pair Llama-3.1-Tulu-3-8B-DPO             8B
pair Llama-3.1-Tulu-3-8B                 8B
pair Llama-3.1-Tulu-3.1-8B               8B
pair Llama-3.1-Tulu-3-70B-DPO            70B
pair Llama-3.1-Tulu-3-70B                70B
pair Llama-3.1-Tulu-3-405B-DPO           405B
pair Llama-3.1-Tulu-3-405B               405B

pair OLMo-2-0425-1B-DPO                  1B
pair OLMo-2-0425-1B-Instruct             1B
pair OLMo-2-1124-7B-DPO                  7B
pair OLMo-2-1124-7B-Instruct             7B
pair OLMo-2-1124-13B-DPO                 13B
pair OLMo-2-1124-13B-Instruct            13B
pair OLMo-2-0325-32B-DPO                 32B
pair OLMo-2-0325-32B-Instruct            32B

pair Olmo-3-7B-Instruct-DPO              7B
pair Olmo-3-7B-Think-DPO                 7B
pair Olmo-3-7B-Instruct                  7B
pair Olmo-3-7B-Think                     7B
pair Olmo-3-32B-Think-DPO                32B
pair Olmo-3.1-32B-Instruct-DPO           32B
pair Olmo-3-32B-Think                    32B
pair Olmo-3.1-32B-Instruct               32B
pair Olmo-3.1-32B-Think                  32B

pair OLMoE-1B-7B-0125-DPO                7B
pair OLMoE-1B-7B-0125-Instruct           7B

pair SmolLM2-1.7B-Instruct               1.7B
pair SmolLM3-3B                          3B
pair SmolLM3-3B-APO                      3B

pair Instella-3B-Instruct                3B
pair Mistral-7B-Base-SFT-SimPO           7B
pair notus-7b-v1                         7B
pair zephyr-7b-gemma-v0.1                7B
pair Llama-3-Base-8B-SFT-DPO             8B
pair Llama-3-Base-8B-SFT-SimPO           8B
pair Llama-3.1-8B-Magpie-Align-v0.1      8B
pair Llama-Poro-2-8B-Instruct            8B
pair starchat2-15b-v0.1                  15B
pair Nous-Hermes-2-Mixtral-8x7B-DPO      8x7B

shopt -s nocasematch
known() { # NAME; the name as it is spelled here
    local one
    for one in "${names[@]}"; do
        if [[ $one == "$1" ]]; then echo "$one" && return; fi
    done
    echo "no pair of today is called $1; without a name this script lists them" >&2
    return 2
}

case " $* " in
    *" -h "* | *" --help "*) sed -n '2,/^source/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
esac
if [ $# -eq 0 ]; then
    for i in "${!names[@]}"; do printf '%-36s %5s\n' "${names[i]}" "${sizes[i]}"; done
    echo "name the pairs to sweep: bash scripts/pairs_of_today.sh NAME…" >&2
    exit
fi
chosen=()
for name in "$@"; do
    found=$(known "$name") || exit 2
    chosen+=("$found")
done
for name in "${chosen[@]}"; do sweep "$name"; done
