"""expo sweep --search race: its rows are the grid's, fewer of them; what is on disk is all that it remembers."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crashes import ended, forked, killed_when
from sizes import sized
from test_score import make_reward_model
from test_sweep import (  # fixtures, too
    cache,  # noqa: F401
    drawn,  # noqa: F401
    engines,  # noqa: F401
    pictures,  # noqa: F401
    processes,  # noqa: F401
    record_of,
    reward_model,  # noqa: F401
    swept,  # noqa: F401
    verdicts,  # noqa: F401
)
from test_sweep_processes import wait_until_no_row_is_written

from expo.arguments import arguments_of
from expo.cli import program as cli
from expo.config import SweepConfig
from expo.errors import InputError
from expo.files import Row
from expo.verbs import sweep as verb
from expo.verbs.sweep.estimate import plan_with_cost

pytestmark = pytest.mark.xdist_group("race")  # they share what was raced

QUESTIONS = 48


@pytest.fixture
def task(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    rows = ({"prompt": f"w{n} w{n * 7 % 50} w{n * 3 % 50}", "category": f"c{n % 3}"} for n in range(QUESTIONS))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def raced(swept):  # noqa: F811
    """A function that gives the settings of a small race."""

    def settings(**others: Any) -> SweepConfig:
        batches = {"batch_tokens": 400, "reward_batch_tokens": 400}
        return swept(**{"search": "race", "alpha": (0.5, 1.0, 2.0, 4.0), "n": 2, "seed": FOUND, **batches, **others})

    return settings


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what is made once for the tests of this file lies."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def finished(raced, kept: Path, engines: Path) -> Callable[[SweepConfig], SweepConfig]:  # noqa: F811
    """A function that puts the finished race, or grid, of these settings where they say; each is run once."""

    def put(config: SweepConfig) -> SweepConfig:
        folder, opened = kept / config.search, kept / f"{config.search}.engines"
        if not folder.exists():
            engines.write_text("")
            verb.run(replace(config, output=str(folder)))
            opened.write_text(engines.read_text())
        shutil.copytree(folder, config.output)
        engines.write_text(opened.read_text())
        return config

    return put


FOUND, NOT_FOUND = 0, 1
"""Seeds with which a race of random models has a candidate that is confirmed, and none; with most versions of torch."""


def first(raced, seed: int, wanted: Callable[[Row], bool]) -> SweepConfig:
    """The settings of a finished race of which this holds: with this seed, or else with the next one."""
    for one in (seed, *range(2, 20)):
        config = raced(seed=one)
        config = replace(config, output=f"{config.output}-{one}")
        if wanted(verb.run(config).record):
            return config
    pytest.fail("no seed gives such a race")


def outputs_of(config: SweepConfig) -> dict[float, Path]:
    """α → its output."""
    record, folder = record_of(Path(config.output)), Path(config.output) / "outputs_questions"
    return {one["alpha"]: folder / f"{one['name']}.jsonl" for one in record["alphas"]}


def ids_of(output: Path) -> list[tuple[str, int]]:
    said = json.loads(output.with_name(f"{output.stem}.meta.json").read_text())["per_row"]
    return list(zip(said["id"], said["sample"], strict=True))


def test_a_race_makes_rows_of_the_grid_and_no_more_than_half(raced, finished, tmp_path):
    config, whole = finished(raced()), finished(raced(search="grid", output=str(tmp_path / "grid")))
    record = record_of(Path(config.output))
    rows, tokens = 0, []
    for alpha, output in outputs_of(config).items():
        ids, grid = ids_of(output), outputs_of(whole)[alpha]
        place = {key: number for number, key in enumerate(ids_of(grid))}
        lines, rewards = [grid.read_text().splitlines(), rewards_of(grid).read_text().splitlines()]
        assert [place[key] for key in ids] == sorted(place[key] for key in ids), "in task order"
        assert output.read_text().splitlines() == [lines[place[key]] for key in ids]
        ours = list(map(float, rewards_of(output).read_text().splitlines()))
        assert ours == pytest.approx([float(rewards[place[key]]) for key in ids], abs=1e-5)
        rows += len(ids)
        tokens.append(
            [sum(json.loads(line)["length"] for line in file.read_text().splitlines()) for file in (output, grid)]
        )
        one = next(one for one in record["alphas"] if one["alpha"] == alpha)
        assert one["n"] == len(ids) == 2 * sum(one["answered"].values())
    share = sum(ours for ours, _ in tokens) / sum(theirs for _, theirs in tokens)
    assert record["race"]["share_of_grid"] == pytest.approx(share, rel=0.05), "the grid's tokens are known by its share"
    assert share <= 0.52
    assert rows <= 0.55 * 2 * QUESTIONS * 5, "answers are about as long with every α"


def rewards_of(output: Path) -> Path:
    return output.parents[1] / "rewards_questions" / output.name


def test_the_verdict_is_one_test_on_prompts_that_the_race_did_not_see(raced, finished):
    config = finished(raced())
    if record_of(Path(config.output))["best_alpha"] == 0:
        config = first(raced, 2, lambda record: record["best_alpha"] > 0)
    record = record_of(Path(config.output))
    found, race = record["confirmation"], record["race"]
    assert found["alpha"] == race["candidate"] == record["best_alpha"] > 0
    assert found["interval"][0] > 0
    assert found["p_one_sided"] <= 0.05
    rows = {alpha: dict(zip(ids_of(file), rewards_of(file).read_text().split(), strict=True))
            for alpha, file in outputs_of(config).items()}  # fmt: skip
    in_race = set(rows[0.5]) if record["best_alpha"] != 0.5 else set(rows[1.0])
    aside = set(rows[0.0]) - in_race
    assert len(aside) == found["n"] == 2 * found["prompts"] == 2 * race["settings"]["confirmation"]
    difference = [float(rows[found["alpha"]][key]) - float(rows[0.0][key]) for key in aside]
    assert found["difference"] == pytest.approx(sum(difference) / len(difference))
    assert f"on the {found['prompts']} prompts set aside" in record["verdict"]


def test_where_no_alpha_is_ahead_nothing_is_confirmed(raced):
    config = first(raced, NOT_FOUND, lambda record: record["race"]["candidate"] is None)
    record = record_of(Path(config.output))
    assert (record["best_alpha"], record["confirmation"], record["race"]["candidate"]) == (0.0, None, None)
    asked = record["race"]["looks"][-1]["prompts"]
    assert {len(ids_of(file)) for file in outputs_of(config).values()} == {2 * asked}
    assert "No α is chosen" in record["verdict"]


def test_a_finished_race_is_complete_and_starts_nothing(raced, finished, kept, processes):  # noqa: F811
    finished(raced())
    config = raced(output=str(kept / "race"))  # where it was made, as its record says
    first, started = record_of(Path(config.output)), len(processes)
    again = verb.run(config)
    assert (again.status, len(processes)) == ("already complete", started)
    assert record_of(Path(config.output)) == first == json.loads(json.dumps(again.record))


@pytest.mark.full  # a killed search over modules is in CI, which begins with a race
def test_a_race_that_is_killed_again_and_again_ends_as_it_would_have(raced, tmp_path):
    """Each time when a certain number of rows is there, of answers and rewards together."""
    small = {"batch_tokens": 60, "reward_batch_tokens": 60}  # rows are on disk when their batch is made
    settings: dict[str, Any] = {"refine": True, "slice": 5, "indifference": 0.0, **small}
    whole, config = raced(output=str(tmp_path / "whole"), **settings), raced(**settings)
    verb.run(whole)
    words, folder, chance = ["sweep", *arguments_of(config)], Path(config.output), random.Random(5)
    total, codes = rows_in(Path(whole.output)), []
    for share in sorted(chance.uniform(0.02, 0.98) for _ in range(sized(ci=1, full=4))):
        codes.append(killed_when(lambda: rows_in(folder) >= share * total, lambda: cli.run(words)))  # noqa: B023
        wait_until_no_row_is_written(folder)
    assert -signal.SIGKILL in codes
    assert ended(forked(lambda: cli.run(words))) == 0
    ours, theirs = (record_of(Path(one.output)) for one in (config, whole))
    for name in ("best_alpha", "n", "verdict"):
        assert ours[name] == theirs[name]
    for one, other in zip(ours["race"]["looks"], theirs["race"]["looks"], strict=True):
        assert [one[name] for name in ("prompts", "leader", "added", "ends")] == [
            other[name] for name in ("prompts", "leader", "added", "ends")
        ]
    for alpha, file in outputs_of(config).items():
        assert file.read_bytes() == outputs_of(whole)[alpha].read_bytes()
    assert [file.name for file in folder.rglob(".*")] == []


def rows_in(folder: Path) -> int:
    """The rows that are on disk, those of a journal and of the file that it extends counted once."""
    lines = dict[tuple[Path, str], int]()
    for file in (Path(place, name) for place, _, names in os.walk(folder) for name in names if name.endswith(".jsonl")):
        name = file.name.removeprefix(".").removesuffix(".jsonl").removesuffix(".journal")
        with suppress(FileNotFoundError):
            count = file.read_bytes().count(b"\n")
            lines[file.parent, name] = max(count, lines.get((file.parent, name), 0))
    return sum(count for (_, name), count in lines.items() if not name.endswith(".rows"))


def test_the_rules_of_a_race_are_fixed_with_its_first_answer(raced, finished, reward_model, llama_pair, tmp_path):  # noqa: F811
    second = make_reward_model(tmp_path / "second", llama_pair[1], labels=1, pad_id=2)
    finished(raced())
    for changed, named in (
        ({"slice": 5, "overwrite": True}, "slice"),
        ({"reward_model": (str(reward_model), str(second))}, "reward_models"),
        ({"slice": 5}, "slice"),
        ({"confidence": 0.9}, "confidence"),
        ({"alpha": (0.5, 1.0)}, "alphas"),
        ({"limit": 40}, "questions"),
    ):
        with pytest.raises(InputError, match=f"different rules .*{named}"):
            verb.run(raced(**changed))


def test_a_grid_makes_a_race_whole_and_no_race_begins_where_rows_were_compared(raced, finished, tmp_path):
    config, whole = finished(raced()), finished(raced(search="grid", output=str(tmp_path / "grid")))
    ours, theirs = verb.run(raced(search="grid")).record, record_of(Path(whole.output))
    assert ours["best_alpha"] == theirs["best_alpha"]
    assert "race" not in ours
    for alpha, file in outputs_of(config).items():
        assert file.read_bytes() == outputs_of(whole)[alpha].read_bytes()
    with pytest.raises(InputError, match="already compared its rows"):
        verb.run(config)


def test_a_reference_answers_the_first_slice_and_added_alphas_all_that_was_asked(raced):
    config = raced(with_sft=True, refine=True, indifference=0.0, slice=5)
    record = verb.run(config).record
    looks, of = record["race"]["looks"], {one["alpha"]: one for one in record["alphas"]}
    assert of[-1.0]["answered"] == {"race": looks[0]["prompts"], "confirmation": 0}
    added = [alpha for look in looks for alpha in look["added"]]
    assert added
    for alpha in added:
        assert of[alpha]["answered"]["race"] >= looks[1]["prompts"], "earlier slices, too"


def test_no_engine_is_asked_for_what_it_would_not_be_asked_again(raced, finished, engines):  # noqa: F811
    """One engine of each kind makes a race, from look to look and for the confirmation."""
    finished(raced())
    opened = [line for line in engines.read_text().splitlines() if line.endswith("__init__")]
    assert sorted(opened)[-1:] == ["TransformersScorer __init__"]
    assert opened.count("TransformersScorer __init__") == 1
    assert opened.count("TransformersGenerator __init__") <= 2, "one more for the proof"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"search": "grid", "slice": 5}, "--slice needs --search race"),
        ({"search": "grid", "refine": True}, "--refine needs --search race"),
        ({"confirm": 0.0}, "--confirm"),
        ({"confirm": 0.5}, "--confirm"),
        ({"confirm": 1e-9}, "--confirm"),
        ({"confidence": 1.0}, "--confidence"),
        ({"indifference": -0.1}, "--indifference"),
        ({"slice": 1}, "--slice"),
        ({"alpha": (1.0,)}, "needs no race"),
    ],
)
def test_settings_that_a_race_refuses(raced, changed, message):
    with pytest.raises(InputError, match=message):
        raced(**changed)


def test_the_plan_of_a_race_says_what_it_takes_at_most(raced, processes, capsys):  # noqa: F811
    plan = plan_with_cost(raced()).describe()
    cli.print_plan(plan, as_json=False)
    assert "half of the grid's tokens" in capsys.readouterr().out
    assert plan["at_most"]
    assert plan["rows_to_generate"] == 2 * QUESTIONS * 5 // 2
    assert plan["race"]["confirmation"] == round(0.3 * QUESTIONS)
