"""The known models, and the scripts that run them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import helpers
import pytest

from expo import recipes
from expo.checkpoint.folder import Location
from expo.config import ScoreConfig
from expo.config_files import values_for
from expo.errors import InputError
from expo.score.known import with_recipe

SCRIPTS = Path(__file__).parents[1] / "scripts"

PAPER = """
HuggingFaceH4/zephyr-7b-alpha           HuggingFaceH4/mistral-7b-sft-alpha     0.3
HuggingFaceH4/zephyr-7b-beta            HuggingFaceH4/mistral-7b-sft-beta      0.1
berkeley-nest/Starling-LM-7B-alpha      openchat/openchat_3.5                  0.2
Nexusflow/Starling-LM-7B-beta           openchat/openchat-3.5-0106             0.5
snorkelai/Snorkel-Mistral-PairRM-DPO    mistralai/Mistral-7B-Instruct-v0.2     0.3
RLHFlow/LLaMA3-iterative-DPO-final      RLHFlow/LLaMA3-SFT                     0.3
internlm/internlm2-chat-1_8b            internlm/internlm2-chat-1_8b-sft       0.5
internlm/internlm2-chat-7b              internlm/internlm2-chat-7b-sft         0.5
internlm/internlm2-chat-20b             internlm/internlm2-chat-20b-sft        0.5
allenai/tulu-2-dpo-7b                   allenai/tulu-2-7b                      0.5
allenai/tulu-2-dpo-13b                  allenai/tulu-2-13b                     0.5
allenai/tulu-2-dpo-70b                  allenai/tulu-2-70b                     0.5
alignment-handbook/zephyr-7b-dpo-full   alignment-handbook/zephyr-7b-sft-full  0.3
chujiezheng/zephyr_0.1                  alignment-handbook/zephyr-7b-sft-full  8.0
chujiezheng/zephyr_0.2                  alignment-handbook/zephyr-7b-sft-full  2.5
chujiezheng/zephyr_0.4                  alignment-handbook/zephyr-7b-sft-full  0.5
chujiezheng/zephyr_0.05                 alignment-handbook/zephyr-7b-sft-full  25.0
"""
PUBLISHED = """
princeton-nlp/Llama-3-Instruct-8B-SimPO meta-llama/Meta-Llama-3-8B-Instruct    0.3
UCLA-AGI/Mistral7B-PairRM-SPPO          mistralai/Mistral-7B-Instruct-v0.2     0.3
abacusai/Smaug-34B-v0.1                 jondurbin/bagel-34b-v0.2               0.3
abacusai/Smaug-Llama-3-70B-Instruct     meta-llama/Meta-Llama-3-70B-Instruct   0.3
m-a-p/neo_7b_instruct_v0.1              m-a-p/neo_7b_sft_v0.1                  0.3
"""


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines() if line]


def test_every_known_model_has_its_recipe_and_there_are_no_others():
    found = {one.dpo: (one.sft, one.alpha) for one in map(recipes.load, recipes.names())}
    assert found == {dpo: (sft, float(alpha)) for dpo, sft, alpha in rows(PAPER + PUBLISHED)}


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_are_whole_and_never_trust_remote_code(name):
    recipe = recipes.load(name)
    assert recipe.source
    assert recipe.dpo.split("/")[1] == name
    assert values_for("generate", recipe.tables)["model"] == recipe.dpo
    for command in ("extrapolate", "generate", "score"):
        assert "trust_remote_code" not in values_for(command, recipe.tables)
    stops = values_for("generate", recipe.tables).get("stop_token_id")
    assert (stops == [92542]) == name.startswith("internlm2")


def test_names_are_found_in_any_case_and_unknown_ones_refused():
    assert recipes.load("STARLING-lm-7b-beta").name == "Starling-LM-7B-beta"
    with pytest.raises(InputError, match="no recipe 'nope'; `expo recipes` lists them"):
        recipes.load("nope")


def test_the_list_is_printed_as_a_table_and_as_json(run_expo):
    table = run_expo("recipes")
    assert table.code == 0
    pairs, reward_models = table.stdout.rstrip().split("\n\n")
    assert len(pairs.splitlines()) == 1 + len(recipes.names())
    assert len(reward_models.splitlines()) == 1 + len(recipes.reward_model_names())
    assert "; the SFT checkpoint was published as .bin: --allow-pickle reads it\n" in table.stdout
    one = json.loads(run_expo("recipes", "zephyr_0.1", "--json").stdout)["recipes"]
    assert [(row["name"], row["alpha"]) for row in one] == [("zephyr_0.1", 8.0)]
    both = json.loads(run_expo("recipes", "zephyr_0.1", "fsfairx-llama3-rm-v0.1", "--json").stdout)
    assert len(both["recipes"]) == 1
    assert [(row["reward_model"], row["settings"]) for row in both["reward_models"]] == [
        ("sfairXC/FsfairX-LLaMA3-RM-v0.1", {"bos": "none"})
    ]


REWARD_MODELS = {
    "weqweasdas/RM-Mistral-7B": {},
    "sfairXC/FsfairX-LLaMA3-RM-v0.1": {"bos": "none"},
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": {"max_length": 16384},
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": {"max_length": 16384},
}


def test_known_reward_models_have_what_is_special_about_them():
    found = {one.reward_model: one for one in map(recipes.load, recipes.reward_model_names())}
    assert {hub_id: one.settings for hub_id, one in found.items()} == REWARD_MODELS
    for hub_id, one in found.items():
        assert one.name == hub_id.split("/")[1]
        assert one.source
        assert recipes.of_reward_model(hub_id.upper()) == one
        assert values_for("score", one.tables)["reward_model"] in (hub_id, [hub_id])
    assert recipes.of_reward_model("another/RM-Mistral-7B") is None
    assert recipes.of_reward_model("weqweasdas/another") is None
    assert not set(recipes.names()) & set(recipes.reward_model_names())


def known(location: Location, **given: object) -> tuple[object, object]:
    config = with_recipe(ScoreConfig(task="alpaca", name="m", reward_model="me/rm", **given), location)
    return config.bos, config.max_length


def test_a_known_reward_models_settings_are_taken_where_none_are_given(caplog):
    folder = Path("/nowhere")
    fsfair, skywork = (
        Location(folder, hub_id.split("/")[1], hub_id)
        for hub_id in ("sfairXC/FsfairX-LLaMA3-RM-v0.1", "Skywork/Skywork-Reward-V2-Qwen3-0.6B")
    )
    with caplog.at_level("INFO", logger="expo"):
        assert known(fsfair) == ("none", None)
    assert "recipe FsfairX-LLaMA3-RM-v0.1: --bos none (the paper's second; trained without BOS" in caplog.text
    assert known(fsfair, bos="template") == ("template", None)
    assert known(skywork) == ("template", 16384)
    assert known(skywork, max_length=100) == ("template", 100)
    assert known(Location(folder, "FsfairX-LLaMA3-RM-v0.1")) == ("template", None), (
        "a folder of that name may be anything"
    )
    assert known(Location(folder, "rm", "me/rm")) == ("template", None)


@pytest.mark.parametrize(("dpo", "sft", "alpha"), rows(PAPER))
def test_every_model_of_the_paper_has_its_two_scripts(dpo, sft, alpha):
    name = dpo.split("/")[1]
    for suffix, function in (("", "baseline"), ("_extra", "extra")):
        script = SCRIPTS / f"{name}{suffix}.sh"
        assert os.access(script, os.X_OK)
        assert script.read_text().splitlines()[-1] == f"{function} {name}"


FAKE_EXPO = """#!/usr/bin/env bash
echo "$@" >> "$LOG"
if [ "$1" = extrapolate ]; then echo "$OUTPUT_DIR/checkpoints/M-ExPO-a0.7"; fi
if [ "$1" = generate ]; then exit "${GENERATE_CODE:-0}"; fi
"""


def run_script(folder: Path, name: str, **variables: str) -> tuple[int, list[str]]:
    """Run a script with a stand-in for expo that writes its arguments down."""
    fake = folder / "bin" / "expo"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(FAKE_EXPO)
    fake.chmod(0o755)
    log = folder / "log"
    log.unlink(missing_ok=True)
    path = f"{fake.parent}:{os.environ['PATH']}"
    env = helpers.environment(PATH=path, LOG=str(log), OUTPUT_DIR=str(folder), **variables)
    done = subprocess.run(["bash", SCRIPTS / name], env=env, capture_output=True, text=True)
    return done.returncode, log.read_text().splitlines()


def test_scripts_say_what_the_variables_say(tmp_path):
    code, calls = run_script(tmp_path, "Starling-LM-7B-beta_extra.sh", ALPHA="0.7", LIMIT="5", TASK="alpaca")
    assert code == 0
    assert [call.split()[0] for call in calls] == ["extrapolate", "generate", "score"]
    assert "--recipe Starling-LM-7B-beta" in calls[0]
    assert "--alpha 0.7" in calls[0]
    assert calls[1].startswith("generate alpaca ")
    assert f"--name M-ExPO-a0.7 --output-dir {tmp_path} --model {tmp_path}/checkpoints/M-ExPO-a0.7" in calls[1]
    assert "--limit 5" in calls[1]
    assert "--limit 5" in calls[2]


def test_each_command_of_a_script_takes_further_flags(tmp_path):
    verbs = ("extrapolate", "generate", "score")
    flags = {f"{verb.upper()}_ARGS": f"--of {verb}" for verb in verbs}
    code, calls = run_script(tmp_path, "tulu-2-dpo-7b_extra.sh", TASK="alpaca", **flags)
    assert code == 0
    assert [call.split()[-2:] for call in calls] == [["--of", verb] for verb in verbs]


def test_baselines_run_both_tasks_by_default(tmp_path):
    code, calls = run_script(tmp_path, "zephyr-7b-beta.sh")
    assert code == 0
    words = [call.split()[:2] for call in calls]
    assert words == [[verb, task] for task in ("ultrafeedback", "alpaca") for verb in ("generate", "score")]


@pytest.mark.parametrize(("code", "calls"), [("3", 4), ("1", 1), ("2", 1)])
def test_scripts_go_on_after_failed_rows_only(tmp_path, code, calls):
    ended, log = run_script(tmp_path, "zephyr-7b-beta.sh", GENERATE_CODE=code)
    assert len(log) == calls
    assert ended == (0 if code == "3" else int(code))
