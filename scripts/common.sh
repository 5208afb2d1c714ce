# Sourced by the scripts of single models. What can be set from outside:
#   ALPHA        extrapolation strength of *_extra.sh (default: the recipe's)
#   TASK         ultrafeedback, alpaca, a prompt file, or several in quotes (default: "ultrafeedback alpaca")
#   LIMIT        only the first so many prompts
#   MODEL, SFT   other checkpoints than the recipe's: a folder, a hub id, or id@revision
#   REWARD_MODEL another reward model
#   OUTPUT_DIR   holds outputs_*/ and rewards_*/ (default: this folder's parent)
#   EXTRAPOLATE_ARGS, GENERATE_ARGS, SCORE_ARGS   further flags, such as EXTRAPOLATE_ARGS="--allow-pickle" or
#                GENERATE_ARGS="--max-tokens 512 --trust-remote-code"
#   CUDA_VISIBLE_DEVICES        the GPUs to use
# Every step continues where an earlier run stopped. Rows that failed (exit code 3) are marked, and the script goes on.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUTPUT_DIR=${OUTPUT_DIR:-$root}

go_on() {
    local code=0
    "$@" || code=$?
    [ "$code" -eq 0 ] || [ "$code" -eq 3 ] || exit "$code"
}

# generate_and_score RECIPE NAME [--model MODEL]
generate_and_score() {
    local recipe=$1 name=$2 task
    shift 2
    for task in ${TASK:-ultrafeedback alpaca}; do
        # shellcheck disable=SC2086 # the flags are several words
        go_on expo generate "$task" --recipe "$recipe" --name "$name" --output-dir "$OUTPUT_DIR" "$@" \
            ${LIMIT:+--limit "$LIMIT"} ${GENERATE_ARGS:-}
        # shellcheck disable=SC2086
        go_on expo score "$task" --recipe "$recipe" --name "$name" --output-dir "$OUTPUT_DIR" \
            ${LIMIT:+--limit "$LIMIT"} ${REWARD_MODEL:+--reward-model "$REWARD_MODEL"} ${SCORE_ARGS:-}
    done
}

# The model as it was released.
baseline() {
    generate_and_score "$1" "$1" ${MODEL:+--model "$MODEL"}
}

# The model extrapolated: the checkpoint goes to checkpoints/<recipe>-ExPO-a<alpha>.
extra() {
    local checkpoint
    # shellcheck disable=SC2086 # the flags are several words
    checkpoint=$(expo extrapolate --recipe "$1" --output "$OUTPUT_DIR/checkpoints/$1-ExPO-a{alpha}" \
        ${ALPHA:+--alpha "$ALPHA"} ${SFT:+--sft "$SFT"} ${MODEL:+--dpo "$MODEL"} ${EXTRAPOLATE_ARGS:-})
    generate_and_score "$1" "$(basename "$checkpoint")" --model "$checkpoint"
}
