"""The known models, and the scripts that run them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest
from hub_server import FakeHub, read_folder
from made_inputs import real

from expo import recipes
from expo.checkpoint.folder import Location
from expo.cli import program as cli
from expo.config import COMMANDS, ScoreConfig
from expo.config_files import values_for
from expo.errors import InputError
from expo.verbs.score.known import with_recipe

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


TODAY = """
allenai/Llama-3.1-Tulu-3-8B-DPO                  allenai/Llama-3.1-Tulu-3-8B-SFT
allenai/Llama-3.1-Tulu-3-8B                      allenai/Llama-3.1-Tulu-3-8B-SFT
allenai/Llama-3.1-Tulu-3.1-8B                    allenai/Llama-3.1-Tulu-3-8B-SFT
allenai/Llama-3.1-Tulu-3-70B-DPO                 allenai/Llama-3.1-Tulu-3-70B-SFT
allenai/Llama-3.1-Tulu-3-70B                     allenai/Llama-3.1-Tulu-3-70B-SFT
allenai/Llama-3.1-Tulu-3-405B-DPO                allenai/Llama-3.1-Tulu-3-405B-SFT
allenai/Llama-3.1-Tulu-3-405B                    allenai/Llama-3.1-Tulu-3-405B-SFT
allenai/OLMo-2-0425-1B-DPO                       allenai/OLMo-2-0425-1B-SFT
allenai/OLMo-2-0425-1B-Instruct                  allenai/OLMo-2-0425-1B-SFT
allenai/OLMo-2-1124-7B-DPO                       allenai/OLMo-2-1124-7B-SFT
allenai/OLMo-2-1124-7B-Instruct                  allenai/OLMo-2-1124-7B-SFT
allenai/OLMo-2-1124-13B-DPO                      allenai/OLMo-2-1124-13B-SFT
allenai/OLMo-2-1124-13B-Instruct                 allenai/OLMo-2-1124-13B-SFT
allenai/OLMo-2-0325-32B-DPO                      allenai/OLMo-2-0325-32B-SFT
allenai/OLMo-2-0325-32B-Instruct                 allenai/OLMo-2-0325-32B-SFT
allenai/Olmo-3-7B-Instruct-DPO                   allenai/Olmo-3-7B-Instruct-SFT
allenai/Olmo-3-7B-Think-DPO                      allenai/Olmo-3-7B-Think-SFT
allenai/Olmo-3-7B-Instruct                       allenai/Olmo-3-7B-Instruct-SFT
allenai/Olmo-3-7B-Think                          allenai/Olmo-3-7B-Think-SFT
allenai/Olmo-3-32B-Think-DPO                     allenai/Olmo-3-32B-Think-SFT
allenai/Olmo-3.1-32B-Instruct-DPO                allenai/Olmo-3.1-32B-Instruct-SFT
allenai/Olmo-3-32B-Think                         allenai/Olmo-3-32B-Think-SFT
allenai/Olmo-3.1-32B-Instruct                    allenai/Olmo-3.1-32B-Instruct-SFT
allenai/Olmo-3.1-32B-Think                       allenai/Olmo-3-32B-Think-SFT
allenai/OLMoE-1B-7B-0125-DPO                     allenai/OLMoE-1B-7B-0125-SFT
allenai/OLMoE-1B-7B-0125-Instruct                allenai/OLMoE-1B-7B-0125-SFT
HuggingFaceTB/SmolLM2-1.7B-Instruct              HuggingFaceTB/SmolLM2-1.7B-sft-only
HuggingFaceTB/SmolLM3-3B                         HuggingFaceTB/SmolLM3-3B-checkpoints@it-SFT
HuggingFaceTB/SmolLM3-3B-checkpoints@it-soup-APO HuggingFaceTB/SmolLM3-3B-checkpoints@it-SFT
amd/Instella-3B-Instruct                         amd/Instella-3B-SFT
princeton-nlp/Mistral-7B-Base-SFT-SimPO          alignment-handbook/zephyr-7b-sft-full
argilla/notus-7b-v1                              alignment-handbook/zephyr-7b-sft-full
HuggingFaceH4/zephyr-7b-gemma-v0.1               HuggingFaceH4/zephyr-7b-gemma-sft-v0.1
princeton-nlp/Llama-3-Base-8B-SFT-DPO            princeton-nlp/Llama-3-Base-8B-SFT
princeton-nlp/Llama-3-Base-8B-SFT-SimPO          princeton-nlp/Llama-3-Base-8B-SFT
Magpie-Align/Llama-3.1-8B-Magpie-Align-v0.1      Magpie-Align/Llama-3.1-8B-Magpie-Align-SFT-v0.1
LumiOpen/Llama-Poro-2-8B-Instruct                LumiOpen/Llama-Poro-2-8B-SFT
HuggingFaceH4/starchat2-15b-v0.1                 HuggingFaceH4/starchat2-15b-sft-v0.1
NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO      NousResearch/Nous-Hermes-2-Mixtral-8x7B-SFT
"""
"""Both stages are public, and no α is."""


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines() if line]


OF_REVISIONS = {"HuggingFaceTB/SmolLM3-3B-checkpoints@it-soup-APO": "SmolLM3-3B-APO"}
"""What the recipe of a revision is called: an @ in a name stands before a reward model's."""


def name_of(dpo: str) -> str:
    return OF_REVISIONS[dpo] if "@" in dpo else dpo.split("/")[1]


WITHOUT_ALPHA = [name_of(dpo) for dpo, _sft in rows(TODAY)]


def test_every_known_model_has_its_recipe_and_there_are_no_others():
    found = {one.dpo: (one.sft, one.alpha) for one in map(recipes.load, recipes.names())}
    known = {dpo: (sft, float(alpha)) for dpo, sft, alpha in rows(PAPER + PUBLISHED)}
    assert found == known | {dpo: (sft, None) for dpo, sft in rows(TODAY)}


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_are_whole_and_never_trust_remote_code(name):
    recipe = recipes.load(name)
    assert recipe.source
    assert recipe.link.startswith("https://")
    assert name_of(recipe.dpo) == name
    assert "@" not in name
    assert values_for("generate", recipe.tables)["model"] == recipe.dpo
    for command in ("extrapolate", "generate", "score"):
        assert "trust_remote_code" not in values_for(command, recipe.tables)
    stops = values_for("generate", recipe.tables).get("stop_token_id")
    assert (stops == [92542]) == name.startswith("internlm2")
    assert recipe.allow_pickle == name.startswith("tulu-2")


def test_a_model_that_reasons_is_swept_as_it_was_released():
    reasoning = [name for name in recipes.names() if "Think" in name or name.startswith("SmolLM3")]
    swept = {name: made("sweep", recipes.load(name)) for name in reasoning}
    assert {(one.temperature, one.top_p) for one in swept.values()} == {(0.6, 0.95)}
    assert {name for name, one in swept.items() if one.max_tokens == 32768} == {"SmolLM3-3B", "SmolLM3-3B-APO"}


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """The settings that a command line gives its verb, which is not run."""
    seen: list[object] = []

    def stop(config: object) -> None:
        seen.append(config)
        raise InputError("enough")

    for verb in ("expo.verbs.sweep", "expo.verbs.inspect", "expo.verbs.generate", "expo.verbs.extrapolate"):
        monkeypatch.setattr(f"{verb}.run", stop)

    def run(line: str) -> object:
        assert cli.run(line.split()) == 2
        return seen.pop()

    return run


def made(command: str, recipe: recipes.Recipe) -> object:
    """A command's settings, from a recipe alone."""
    values = values_for(command, recipe.tables)
    return COMMANDS[command](**{key: tuple(one) if isinstance(one, list) else one for key, one in values.items()})


def test_every_recipe_is_enough_to_find_an_alpha_and_to_look_at_the_pair():
    for recipe in map(recipes.load, recipes.names()):
        for command in ("sweep", "inspect"):
            config = made(command, recipe)
            assert (config.sft, config.dpo) == (recipe.sft, recipe.dpo)


@pytest.mark.parametrize("name", ["internlm2-chat-7b", "OLMo-2-0425-1B-DPO"])
def test_what_needs_no_alpha_runs_with_and_without_a_published_one(resolved, name):
    recipe = recipes.load(name)
    swept = resolved(f"sweep --recipe {name}")
    assert (swept.sft, swept.dpo, swept.alpha) == (recipe.sft, recipe.dpo, ())
    inspected = resolved(f"inspect --recipe {name}")
    assert (inspected.sft, inspected.dpo) == (recipe.sft, recipe.dpo)
    answered = resolved(f"generate alpaca --recipe {name}")
    assert (answered.model, answered.sft, answered.dpo, answered.alpha) == (recipe.dpo, None, None, None)
    assert swept.stop_token_id == answered.stop_token_id == ((92542,) if recipe.alpha else ())


def test_extrapolate_names_the_way_to_an_alpha_where_none_is_published(resolved, capsys, tmp_path):
    name = "OLMo-2-0425-1B-DPO"
    assert cli.run(["extrapolate", "--recipe", name.lower()]) == 2
    assert capsys.readouterr() == (
        "",
        f"expo: error: no α is published for {name}: `expo sweep --recipe {name} --output sweeps/{name}` finds one; or "
        "choose one, such as --alpha 0.3\n",
    )
    assert resolved(f"extrapolate --recipe {name} --alpha 0.7").alpha == (0.7,)
    assert cli.run(["extrapolate", "--recipe", name, "--sft", "my/own"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("expo: error: --alpha is missing")
    (tmp_path / "expo.toml").write_text("[extrapolate]\nalpha = [0.2]\n")
    assert resolved(f"extrapolate --recipe {name} --config {tmp_path}/expo.toml").alpha == (0.2,)
    assert resolved("extrapolate --recipe zephyr_0.1").alpha == (8.0,)
    assert resolved(f"generate alpaca --recipe {name} --alpha 0.7").alpha == 0.7


def test_a_stage_that_is_a_revision_is_found_on_the_hub(hub: FakeHub, expo_on_hub, pair: tuple[Path, Path]):
    stages = hub.add("HuggingFaceTB/SmolLM3-3B-checkpoints", {"README.md": b"no model on this branch"})
    for folder, branch in zip(pair, ("it-SFT", "it-soup-APO"), strict=True):
        stages.commit(read_folder(folder), branch)
    done = expo_on_hub("inspect", "--recipe", "SmolLM3-3B-APO", "--dry-run")
    assert (done.code, done.stderr) == (0, "")
    assert [stages.refs[stage] in done.stdout for stage in ("it-SFT", "it-soup-APO")] == [True, True]


# --- published scores ---------------------------------------------------------------------------------------------

SCORES = """
zephyr-7b-alpha            mt_bench             6.85   6.87
zephyr-7b-beta             mt_bench             7.02   7.06
Starling-LM-7B-alpha       mt_bench             7.82   7.91
Starling-LM-7B-beta        mt_bench             8.10   8.18
Snorkel-Mistral-PairRM-DPO mt_bench             7.63   7.69
LLaMA3-iterative-DPO-final mt_bench             8.08   8.45
internlm2-chat-1_8b        mt_bench             5.17   5.26
internlm2-chat-7b          mt_bench             7.72   7.80
internlm2-chat-20b         mt_bench             8.13   8.26
tulu-2-dpo-7b              mt_bench             6.35   6.38
tulu-2-dpo-13b             mt_bench             7.00   7.26
tulu-2-dpo-70b             mt_bench             7.79   8.03
LLaMA3-iterative-DPO-final open_llm_leaderboard 70.59 69.90
Snorkel-Mistral-PairRM-DPO open_llm_leaderboard 65.76 65.65
internlm2-chat-1_8b        open_llm_leaderboard 47.64 47.63
internlm2-chat-7b          open_llm_leaderboard 58.58 59.27
internlm2-chat-20b         open_llm_leaderboard 67.92 68.32
tulu-2-dpo-13b             open_llm_leaderboard 63.09 64.28
tulu-2-dpo-7b              open_llm_leaderboard 57.90 58.71
zephyr_0.1                 reward               3.97   6.57
zephyr_0.2                 reward               4.70   6.95
zephyr_0.4                 reward               5.77   6.75
zephyr-7b-dpo-full         reward               6.16   6.52
"""
ALPACA_EVAL = {"alpaca_eval_win_rate": "win_rate", "alpaca_eval_length_controlled": "length_controlled_winrate"}
"""What the released leaderboard calls them."""


def test_published_scores_are_those_of_the_paper():
    found = {
        (name, key): scores
        for name in recipes.names()
        for key, scores in recipes.load(name).published.items()
        if key not in ALPACA_EVAL
    }
    assert found == {(name, key): (float(one), float(two)) for name, key, one, two in rows(SCORES)}
    assert recipes.load("zephyr-7b-dpo-full").published["alpaca_eval_win_rate"] == (14.7, 18.0)
    assert recipes.load("zephyr-7b-dpo-full").published["alpaca_eval_length_controlled"] == (17.3, 20.2)
    scored = {name for name in recipes.names() if ALPACA_EVAL.keys() <= recipes.load(name).published.keys()}
    assert scored == {dpo.split("/")[1] for dpo, _sft, _alpha in rows(PAPER)}


@pytest.mark.skipif(real() is None, reason="AlpacaEval's leaderboard is not on this machine")
def test_published_scores_are_those_of_the_released_leaderboard():
    with (real().data / "alpaca_eval" / "leaderboard.csv").open() as stream:
        board = {row[""]: row for row in csv.DictReader(stream)}
    for dpo, _sft, alpha in rows(PAPER):
        name = dpo.split("/")[1]
        after = next(one for one in (f"{name}-ExPO", f"{name}_a{alpha}") if one in board)
        for key, column in ALPACA_EVAL.items():
            rounded = tuple(round(float(board[one][column]), 1) for one in (name, after))
            assert recipes.load(name).published[key] == rounded


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mt_bnch = [1.0, 2.0]", "recipe Odd: 'mt_bnch' in .published. is none of alpaca_eval_win_rate, "),
        ("mt_bench = 1.0", "recipe Odd: 'mt_bench' in .published. expects .before, after., not 1.0"),
        ("mt_bench = [1.0]", "expects .before, after., not .1.0."),
    ],
)
def test_a_figure_that_is_not_known_is_refused(monkeypatch, tmp_path, line, message):
    table = f'[recipe]\nsource = "x"\n[extrapolate]\nsft = "s"\ndpo = "d"\n[published]\n{line}\n'
    (tmp_path / "Odd.toml").write_text(table)
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    with pytest.raises(InputError, match=message):
        recipes.load("odd")


def test_names_are_found_in_any_case_and_unknown_ones_refused():
    assert recipes.load("STARLING-lm-7b-beta").name == "Starling-LM-7B-beta"
    with pytest.raises(InputError, match=r"no recipe 'nope'; `expo recipes` lists them$"):
        recipes.load("nope")
    with pytest.raises(InputError, match=r"did you mean Starling-LM-7B-beta"):
        recipes.load("starling-7b-beta")


# --- what is printed ----------------------------------------------------------------------------------------------


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `expo recipes` prints."""

    def run(*words: str, code: int = 0) -> str:
        assert cli.run(["recipes", *words]) == code
        out, err = capsys.readouterr()
        return str(err if code else out)

    return run


def test_the_list_is_printed_as_a_table_and_as_json(printed):
    pairs, reward_models, hint = printed().rstrip().split("\n\n")
    _headings, *lines, footnote = pairs.splitlines()
    assert [line.split()[0] for line in lines] == recipes.names()
    assert sorted(line.split()[0] for line in lines if line.split()[1] == "–") == sorted(WITHOUT_ALPHA)
    assert footnote == "α –: not published; `expo sweep --recipe NAME` finds it"
    assert len(reward_models.splitlines()) == 1 + len(recipes.reward_model_names())
    assert "--show NAME" in hint
    assert "α –" not in printed("zephyr_0.1")
    one = json.loads(printed("zephyr_0.1", "--json"))["recipes"]
    assert [(row["name"], row["alpha"], row["published"]["reward"]) for row in one] == [
        ("zephyr_0.1", 8.0, [3.97, 6.57])
    ]
    both = json.loads(printed("zephyr_0.1", "fsfairx-llama3-rm-v0.1", "--json"))
    assert len(both["recipes"]) == 1
    assert [(row["reward_model"], row["settings"]) for row in both["reward_models"]] == [
        ("sfairXC/FsfairX-LLaMA3-RM-v0.1", {"bos": "none"})
    ]


SHOWN = """\
internlm2-chat-7b
  θ_dpo         internlm/internlm2-chat-7b
  θ_sft         internlm/internlm2-chat-7b-sft
  α             0.5
  source        Zheng et al. 2025 (arXiv 2404.16792)
                https://arxiv.org/abs/2404.16792
  note          answers also stop at token 92542
  settings      --stop-token-id 92542
  needs         --trust-remote-code, which runs the code that comes with the model

published                                                            DPO    ExPO   judge
  AlpacaEval 2.0, win rate (%)                                      20.5    28.1   gpt-4-1106-preview
  AlpacaEval 2.0, length-controlled (%)                             18.3    22.7   gpt-4-1106-preview
  MT-Bench, of 10                                                   7.72    7.80   gpt-4
  Open LLM Leaderboard, mean of six, from the released files (%)   58.58   59.27

next
  expo sweep --recipe internlm2-chat-7b --output sweeps/internlm2-chat-7b --trust-remote-code
  expo extrapolate --recipe internlm2-chat-7b
  bash scripts/alpaca_eval.sh internlm2-chat-7b --trust-remote-code
  bash scripts/mt_bench.sh internlm2-chat-7b --trust-remote-code
  bash scripts/open_llm_leaderboard.sh internlm2-chat-7b --trust-remote-code
"""


def test_one_recipe_in_full(printed):
    assert printed("--show", "INTERNLM2-chat-7b") == SHOWN
    data = json.loads(printed("--show", "internlm2-chat-7b", "--json"))
    assert data["settings"] == {"stop_token_id": [92542]}
    assert data["scores"][2] == {
        "figure": "mt_bench", "benchmark": "MT-Bench, of 10", "unit": "", "before": 7.72, "after": 7.8, "judge": "gpt-4"
    }  # fmt: skip
    assert SHOWN.endswith("".join(f"  {command}\n" for command in data["commands"]))


def test_a_pickled_checkpoint_has_its_flag_in_each_command(printed):
    commands = json.loads(printed("--show", "tulu-2-dpo-7b", "--json"))["commands"]
    assert [command.endswith(" --allow-pickle") for command in commands] == [True] * 5


def test_a_long_note_is_wrapped_under_its_column(printed):
    for name in recipes.names():
        facts = printed("--show", name).split("\n\n")[0].splitlines()[1:]
        assert max(map(len, facts)) <= 120
        note = " ".join(line[16:] for line in facts)
        assert recipes.load(name).note in note


def test_one_recipe_without_alpha_and_scores(printed):
    name = "OLMo-2-0425-1B-Instruct"
    text = printed("--show", name)
    assert f"  α             not published; `expo sweep --recipe {name}` finds it\n" in text
    assert "--sft allenai/OLMo-2-0425-1B-DPO extrapolates that stage alone" in " ".join(text.split())
    assert f"  expo extrapolate --recipe {name} --alpha A\n" in text
    assert "\npublished" not in text
    data = json.loads(printed("--show", name, "--json"))
    assert (data["alpha"], data["published"], data["scores"]) == (None, {}, [])


def test_one_reward_model_in_full(printed):
    text = printed("--show", "FsfairX-LLaMA3-RM-v0.1")
    assert "  settings      --bos none\n" in text
    assert "https://github.com/RLHFlow/RLHF-Reward-Modeling/issues/16\n" in text
    assert text.endswith("  expo sweep --sft SFT --dpo DPO --reward-model sfairXC/FsfairX-LLaMA3-RM-v0.1\n")
    assert json.loads(printed("--show", "FsfairX-LLaMA3-RM-v0.1", "--json"))["settings"] == {"bos": "none"}


def test_showing_one_takes_no_other_names(printed):
    said = printed("zephyr_0.1", "--show", "zephyr_0.2", code=2)
    assert said == "expo: error: --show zephyr_0.2 prints one recipe: leave out zephyr_0.1\n"


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
if [ "$1" = sweep ]; then exit "${SWEEP_CODE:-0}"; fi
"""


def run_script(folder: Path, name: str, *words: str, **variables: str) -> tuple[int, list[str]]:
    """Run a script with a stand-in for expo that writes its arguments down."""
    fake = folder / "bin" / "expo"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(FAKE_EXPO)
    fake.chmod(0o755)
    log = folder / "log"
    log.write_text("")
    path = f"{fake.parent}:{os.environ['PATH']}"
    env = helpers.environment(PATH=path, LOG=str(log), OUTPUT_DIR=str(folder), **variables)
    done = subprocess.run(["bash", SCRIPTS / name, *words], env=env, capture_output=True, text=True)
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


def test_each_pair_of_today_has_a_line_of_its_script(tmp_path):
    lines = (SCRIPTS / "pairs_of_today.sh").read_text().splitlines()
    assert sorted(line.split()[1] for line in lines if line.startswith("pair ")) == sorted(WITHOUT_ALPHA)
    given = {"LIMIT": "5", "TASK": "alpaca", "SWEEP_ARGS": "--search race"}
    code, calls = run_script(tmp_path, "pairs_of_today.sh", *WITHOUT_ALPHA, **given)
    assert code == 0
    assert calls == [
        f"sweep --recipe {name} --output {tmp_path}/sweeps/{name} --task alpaca --limit 5 --search race"
        for name in WITHOUT_ALPHA
    ]


def test_pairs_of_today_are_swept_by_name_alone(tmp_path):
    assert run_script(tmp_path, "pairs_of_today.sh") == (0, [])
    assert run_script(tmp_path, "pairs_of_today.sh", "--help") == (0, [])
    for wrong in ("zephyr_0.1", "*", " ".join(WITHOUT_ALPHA[:2])):
        assert run_script(tmp_path, "pairs_of_today.sh", WITHOUT_ALPHA[0], wrong) == (2, [])
    code, (call,) = run_script(tmp_path, "pairs_of_today.sh", WITHOUT_ALPHA[0].lower())
    assert (code, call.split()[2]) == (0, WITHOUT_ALPHA[0])


@pytest.mark.parametrize(("code", "calls"), [("3", 2), ("1", 1)])
def test_sweeps_go_on_after_failed_rows_only(tmp_path, code, calls):
    ended, log = run_script(tmp_path, "pairs_of_today.sh", *WITHOUT_ALPHA[:2], SWEEP_CODE=code)
    assert len(log) == calls
    assert ended == (0 if code == "3" else 1)
