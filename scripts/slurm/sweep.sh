#!/usr/bin/env bash
# A sweep over α as Slurm jobs. Each α has an array of jobs that answer the prompts and a job that joins them, then an array
# that scores the answers and a job that joins the rewards; the last job compares all α and chooses, with `expo sweep`.
#
# Edit what follows, then run this where `sbatch` is, in an environment that has expo:
#   bash scripts/slurm/sweep.sh
# Run it again when its jobs have ended: it submits what is missing, of an array only the tasks that failed.
set -euo pipefail
shopt -s inherit_errexit

# --- what is swept: edit this ---------------------------------------------------------------------------------------

SFT=HuggingFaceH4/mistral-7b-sft-beta
DPO=HuggingFaceH4/zephyr-7b-beta
REWARD_MODELS=(weqweasdas/RM-Mistral-7B) # the first decides
ALPHAS=(0.1 0.2 0.3 0.4 0.5)             # α = 0, which is DPO, is always measured as well
TASK=ultrafeedback
FOLDER=sweeps/zephyr-7b-beta # on a disk that all nodes see
PARTS=8                      # the tasks of each array

# Further flags of `expo generate` and of `expo score`. Engine and data type are named, since what `auto` means depends on
# the machine, and the joins need no GPU.
GENERATE=(--engine vllm --dtype bfloat16 --limit 1000)
SCORE=(--engine transformers --dtype bfloat16)

# What a job asks Slurm for; your cluster may want --partition or --account.
GPU_JOB=(--gpus=1 --cpus-per-task=8 --mem=64G --time=08:00:00) # a task of an array, and the choice at the end
CPU_JOB=(--cpus-per-task=4 --mem=32G --time=01:00:00)          # a join

# --- what a job does ------------------------------------------------------------------------------------------------

# The date is for chat templates that write it: all α are asked the same, whatever day their jobs run.
generate() { # ALPHA FLAG…
    expo generate "$TASK" --sft "$SFT" --dpo "$DPO" --alpha "$1" --output-dir "$FOLDER" \
        --template-date "$(cat "$FOLDER/date")" "${GENERATE[@]}" "${@:2}"
}

score() { # NAME FLAG…
    expo score "$TASK" --name "$1" --output-dir "$FOLDER" "${REWARD_MODELS[@]/#/--reward-model=}" \
        --template-date "$(cat "$FOLDER/date")" "${SCORE[@]}" "${@:2}"
}

choose() { # NAME…: finds all answers and rewards made, compares them, and writes sweep.json and sweep.png
    expo compare "$@" --task "$TASK" --output-dir "$FOLDER" &&
        expo sweep --task "$TASK" --sft "$SFT" --dpo "$DPO" "${ALPHAS[@]/#/--alpha=}" --output "$FOLDER" \
            "${GENERATE[@]}" "${REWARD_MODELS[@]/#/--reward-model=}" "${SCORE[@]/#--/--reward-}"
}

if [ $# -gt 0 ]; then # a job: the words are one of the functions above, and what it is given
    code=0
    "$@" || code=$?
    [ "$code" -eq 3 ] || exit "$code" # some rows failed and are marked: the others are good to go on with
    exit 0
fi

# --- what is missing ------------------------------------------------------------------------------------------------

jobs="expo-$(basename "$FOLDER")"
logs=$FOLDER/logs

plan_of() { # WORD…: what is there of all parts
    local plan
    plan=$("$@" --join "$PARTS" --dry-run)
    if grep "still running" <<<"$plan" >&2; then # but no job of this sweep is in the queue
        echo "the lock is of a job that was killed on another machine, if nothing else writes this sweep; to remove it:" \
            "find $FOLDER -name '*.lock' -delete" >&2
        exit 1
    fi
    echo "$plan"
}

says() { # PLAN KEY: its value
    sed -n "s/^$2  *//p" <<<"$1"
}

missing() { # PLAN: the tasks to run, as sbatch takes them; `none` where only the join is missing, nothing where it is there
    local tasks
    [ "$(says "$1" joined)" = False ] || return 0
    tasks=$(says "$1" "parts to make")
    echo "${tasks:-none}"
}

queued=$(squeue --noheader --user "$(id -un)" --name "$jobs")
if [ -n "$queued" ]; then
    echo "jobs of this sweep are in the queue: wait for them, or end them with scancel --name $jobs" >&2
    exit 1
fi
mkdir -p "$logs"
[ -f "$FOLDER/date" ] || date +%FT%T >"$FOLDER/date"
alphas=(0 "${ALPHAS[@]}")
names=() answers=() rewards=()
for alpha in "${alphas[@]}"; do
    plan=$(plan_of generate "$alpha")
    name=$(basename "$(says "$plan" output)")
    name=${name%.*}
    tasks=$(missing "$plan")
    names+=("$name")
    answers+=("$tasks")
    if [ -z "$tasks" ]; then
        plan=$(plan_of score "$name")
        tasks=$(missing "$plan")
    else
        tasks=0-$((PARTS - 1)) # what there is to score is known when the answers are
    fi
    rewards+=("$tasks")
done

# --- submitting it --------------------------------------------------------------------------------------------------

submit() { # NAME AFTER OPTION… SCRIPT WORD…: prints the job's number; AFTER is the jobs it waits for, 1:2:3, or nothing
    local id
    id=$(sbatch --parsable --job-name "$jobs" ${2:+--dependency="afterok:$2" --kill-on-invalid-dep=yes} \
        --output "$logs/$1-%j.log" "${@:3}")
    id=${id%%;*} # without the cluster's name
    echo "job $id: $1${2:+, after ${2//:/, }}" >&2
    echo "$id"
}

stage() { # NAME AFTER TASKS WORD…: an array of these tasks of the command, if there are any, and its join
    local after=$2
    [ -n "$3" ] || return 0
    if [ "$3" != none ]; then
        after=$(submit "$1" "$after" "${GPU_JOB[@]}" --array "$3" --output "$logs/$1-%A_%a.log" \
            "$0" "${@:4}" --part "slurm/$PARTS")
    fi
    submit "$1-join" "$after" "${CPU_JOB[@]}" "$0" "${@:4}" --join "$PARTS"
}

last=()
for number in "${!alphas[@]}"; do
    name=${names[number]}
    after=$(stage "$name-generate" "" "${answers[number]}" generate "${alphas[number]}")
    after=$(stage "$name-score" "$after" "${rewards[number]}" score "$name")
    [ -z "$after" ] || last+=("$after")
done
if [ ${#last[@]} -eq 0 ] && [ -f "$FOLDER/sweep.json" ]; then
    echo "all there: $FOLDER/sweep.json" >&2
    exit 0
fi
after=$(IFS=: && echo "${last[*]}")
submit choose "$after" "${GPU_JOB[@]}" "$0" choose "${names[@]}" >/dev/null
