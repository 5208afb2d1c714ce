"""dates: a chat template that writes the date writes one for an output, whenever and wherever its rows are made."""

from __future__ import annotations

import json
import re
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from helpers import CHAT_TEMPLATE

from expo.config import GenerateConfig, ScoreConfig
from expo.errors import InputError
from expo.rows import dates, plan_to_run
from expo.verbs import generate, score

DATED = CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }} w{{ strftime_now('%d') | int }} ", 1)
"""Writes the day of the month, which is a token."""
FIRST, SECOND, THIRD = "2024-03-01T10:00:00", "2024-03-02T11:00:00", "2024-03-03T12:00:00"
DAY_OF_FIRST = 7
"""The token id of w1."""


class Clock:
    """Stands in for `datetime` in the module."""

    fromisoformat = staticmethod(datetime.fromisoformat)

    def __init__(self, moment: str = FIRST) -> None:
        self.moment = moment

    def now(self) -> datetime:
        return datetime.fromisoformat(self.moment)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    stopped = Clock()
    monkeypatch.setattr(dates, "datetime", stopped)
    return stopped


@pytest.fixture
def model(llama_pair, tmp_path) -> Path:
    folder = Path(shutil.copytree(llama_pair[1], tmp_path / "m"))
    (folder / "chat_template.jinja").write_text(DATED)
    return folder


def settings(model: Path, **others) -> GenerateConfig:
    folder = model.parent
    (folder / "q.jsonl").write_text("".join(json.dumps({"prompt": f"w{row + 20}"}) + "\n" for row in range(6)))
    defaults = {"engine": "transformers", "device": "cpu", "dtype": "float32", "max_tokens": 3, "name": "n"}
    return GenerateConfig(
        task=str(folder / "q.jsonl"), model=str(model), output_dir=str(folder), **{**defaults, **others}
    )


def days(job: generate.GenerateJob) -> set[int]:
    return {request.prompt_ids[1] for request in job.requests}


def meta_of(model: Path) -> dict:
    return json.loads((model.parent / "outputs_q" / "n.meta.json").read_text())


def without_date(model: Path) -> None:
    """Make the output one of before dates were recorded."""
    meta = meta_of(model)
    del meta["fingerprint"]["template_date"]
    (model.parent / "outputs_q" / "n.meta.json").write_text(json.dumps(meta))


def journal(model: Path) -> Path:
    """An unfinished output with one row, begun on the first day."""
    job = generate.plan(settings(model))
    row = {"id": "0", "sample": 0, "output": "w1", "length": 3, "finish_reason": "length", "prompt_tokens": 6}
    job.files.journal.parent.mkdir()
    lines = [{"fingerprint": job.fingerprint}, row]
    job.files.journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return job.files.journal


def test_a_finished_output_is_complete_on_the_next_day(model, clock):
    assert generate.run(settings(model)).status == "written"
    clock.moment = SECOND
    assert generate.run(settings(model)).status == "already complete"
    assert generate.run(settings(model, overwrite=True)).status == "already complete"
    assert meta_of(model)["fingerprint"]["template_date"] == FIRST
    assert generate.plan(settings(model)).describe()["template_date"] == FIRST


def test_templates_without_a_clock_have_no_date(llama_pair, tmp_path, clock):
    job = generate.plan(settings(Path(shutil.copytree(llama_pair[1], tmp_path / "m"))))
    assert "template_date" not in job.fingerprint
    assert "template_date" not in job.describe()


def test_another_output_has_a_date_of_its_own(model, clock):
    generate.run(settings(model))
    clock.moment = SECOND
    assert days(generate.plan(settings(model))) == {DAY_OF_FIRST}
    assert days(generate.plan(settings(model, name="other"))) == {DAY_OF_FIRST + 1}


def test_a_date_that_is_given_is_that_of_outputs_that_are_begun(model, clock):
    """So that outputs to be compared have the same prompts, whatever day each is begun; what is begun keeps its own."""
    clock.moment = THIRD
    for index in range(2):
        generate.run(settings(model, template_date="2024-03-02T11:00", part=f"{index}/2"))
        clock.moment = FIRST
    generate.run(settings(model, template_date=SECOND, join=2))
    meta = meta_of(model)
    assert meta["fingerprint"]["template_date"] == SECOND
    assert "template_date" not in meta["config"]
    assert generate.run(settings(model, template_date=THIRD)).status == "already complete"
    assert days(generate.plan(settings(model, name="other", template_date="2024-03-02"))) == {DAY_OF_FIRST + 1}


@pytest.mark.parametrize("given", ["", "yesterday", "2024-02-30", "2024-03-01T10:00+01:00"])
def test_what_is_no_date_is_refused(model, given):
    with pytest.raises(
        InputError, match=f"--template-date must be a local date or time .*, not {re.escape(repr(given))}"
    ):
        settings(model, template_date=given)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_unfinished_output_goes_on_with_its_date(model, clock, overwrite):
    journal(model)
    clock.moment = SECOND
    assert days(generate.plan(settings(model, overwrite=overwrite))) == {DAY_OF_FIRST}
    generate.run(settings(model, overwrite=overwrite))
    assert meta_of(model)["fingerprint"]["template_date"] == FIRST
    assert meta_of(model)["rows_this_run"] == 5


def test_a_larger_limit_extends_with_the_same_date(model, clock):
    generate.run(settings(model, limit=2))
    clock.moment = SECOND
    assert days(generate.plan(settings(model))) == {DAY_OF_FIRST}
    assert generate.run(settings(model)).rows == 6
    assert meta_of(model)["fingerprint"]["template_date"] == FIRST


def test_later_turns_have_the_date_of_the_first(model, clock):
    (model.parent / "questions.jsonl").write_text(
        json.dumps({"question_id": 81, "category": "writing", "turns": ["w10", "w11"]})
    )
    job = generate.plan(
        GenerateConfig(
            task="mtbench", model=str(model), dataset=str(model.parent / "questions.jsonl"), engine="transformers"
        )
    )
    clock.moment = SECOND
    answer = {"id": "81", "sample": 0, "turn": 0, "output": "w12", "finish_reason": "stop"}
    (request,) = job.builder.turn(job.prompts, 1, {("81", 0, 0): answer}).requests
    assert request.prompt_ids[1] == DAY_OF_FIRST


OTHERS = [({"seed": 1}, "seed"), ({"top_k": 3}, "top-k"), ({"system": "w9"}, "system"), ({"n": 2}, "n")]


@pytest.mark.parametrize(("change", "name"), OTHERS, ids=[name for _, name in OTHERS])
def test_what_differs_is_named_and_not_the_date(model, clock, change, name):
    generate.run(settings(model))
    clock.moment = SECOND
    with pytest.raises(InputError, match=f"was made with a different {name} "):
        generate.run(settings(model, **change))
    generate.run(settings(model, **change, overwrite=True))
    assert meta_of(model)["fingerprint"]["template_date"] == SECOND


def test_an_invalid_date_is_one_line(model, clock):
    file = journal(model)
    file.write_text(file.read_text().replace(FIRST, "yesterday"))
    with pytest.raises(InputError, match=r"n\.jsonl has no valid template_date in its fingerprint \('yesterday'\)"):
        generate.plan(settings(model))


# --- outputs of before dates were recorded ---------------------------------------------------------------------------


def test_a_finished_output_without_a_date_is_complete(model, clock):
    generate.run(settings(model))
    without_date(model)
    clock.moment = SECOND
    assert generate.run(settings(model)).status == "already complete"
    assert generate.run(settings(model, limit=3)).status == "already complete"
    assert "template_date" not in meta_of(model)["fingerprint"]


def test_an_output_without_a_date_gets_no_rows_of_another(model, clock):
    generate.run(settings(model, limit=2))
    without_date(model)
    before = sorted(path.name for path in (model.parent / "outputs_q").iterdir())
    for change in ({}, {"part": "0/2"}):
        with pytest.raises(
            InputError, match=r"did not record the date .*; --overwrite makes all rows again with one date"
        ):
            generate.run(settings(model, **change))
    assert before == sorted(path.name for path in (model.parent / "outputs_q").iterdir())
    clock.moment = SECOND
    assert generate.run(settings(model, overwrite=True)).rows == 6
    assert meta_of(model)["fingerprint"]["template_date"] == SECOND
    assert meta_of(model)["rows_this_run"] == 6


def test_an_unfinished_output_without_a_date_neither(model, clock):
    file = journal(model)
    header, row = file.read_text().splitlines()
    fingerprint = json.loads(header)["fingerprint"]
    del fingerprint["template_date"]
    file.write_text(json.dumps({"fingerprint": fingerprint}) + "\n" + row + "\n")
    with pytest.raises(InputError, match="did not record the date"):
        generate.run(settings(model))
    generate.run(settings(model, overwrite=True))
    assert meta_of(model)["rows_this_run"] == 6


def test_an_output_of_another_template_is_refused_as_that(model, clock):
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    generate.run(settings(model))
    (model / "chat_template.jinja").write_text(DATED)
    with pytest.raises(InputError, match=r"was made with a different (chat-template|model)"):
        generate.run(settings(model))


# --- parts -----------------------------------------------------------------------------------------------------------


def test_parts_made_on_several_days_have_the_date_of_the_first(model, clock):
    for part, moment in (("1/3", FIRST), ("0/3", SECOND), ("2/3", THIRD)):
        clock.moment = moment
        assert generate.plan(settings(model, part=part)).date.moment == FIRST
        generate.run(settings(model, part=part))
    clock.moment = THIRD
    generate.run(settings(model, join=3))
    assert meta_of(model)["fingerprint"]["template_date"] == FIRST
    assert sorted(path.name for path in (model.parent / "outputs_q").iterdir()) == ["n.jsonl", "n.meta.json"]
    alone = settings(model, name="alone")
    clock.moment = FIRST
    assert generate.run(alone).output.read_bytes() == (model.parent / "outputs_q" / "n.jsonl").read_bytes()


def test_parts_that_begin_at_once_agree_on_a_date(model, clock):
    plans = []

    def plan_of_the_slower(config):
        plans.append(generate.plan(config))
        if len(plans) == 1:
            clock.moment = SECOND
            plan_to_run(generate.plan, settings(model, part="1/2"))  # another process, a moment earlier
        return plans[-1]

    job = plan_to_run(plan_of_the_slower, settings(model, part="0/2"))
    assert [plan.date.moment for plan in plans] == [FIRST, SECOND]
    assert days(job) == {DAY_OF_FIRST + 1}


def test_parts_of_other_settings_have_a_date_of_their_own(model, clock):
    generate.run(settings(model, part="0/2"))
    clock.moment = SECOND
    assert generate.plan(settings(model, part="1/2")).date.moment == FIRST
    assert generate.plan(settings(model, part="1/2", seed=1)).date.moment == SECOND


def test_a_dry_run_agrees_on_nothing(model, clock):
    generate.plan(settings(model, part="0/2", dry_run=True))
    assert not (model.parent / "outputs_q").exists()


def test_workers_have_the_date_of_their_parent(model, clock, forked_workers):
    forked_workers.before = lambda _: setattr(clock, "moment", SECOND)
    generate.run(settings(model, data_parallel=2))
    assert meta_of(model)["fingerprint"]["template_date"] == FIRST
    assert sorted(path.name for path in (model.parent / "outputs_q").iterdir()) == ["n.jsonl", "n.meta.json"]


def test_where_there_are_no_links_a_file_says_the_date(model, clock, monkeypatch):
    def no_links(self, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    generate.run(settings(model, part="0/2"))
    clock.moment = SECOND
    assert generate.plan(settings(model, part="1/2")).date.moment == FIRST


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_a_reward_models_template_has_one_date_too(trained, tmp_path, clock):
    model = Path(shutil.copytree(trained / "tiny-rm", tmp_path / "rm"))
    template = (trained / "tiny-rm" / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d %b') }}" + template)
    (tmp_path / "o.jsonl").write_text(
        "".join(json.dumps({"prompt": "Name a river.", "output": f"It is {row}."}) + "\n" for row in range(4))
    )
    outputs = str(tmp_path / "o.jsonl")

    clock.moment = THIRD

    def run(**others):
        return score.run(
            ScoreConfig(
                task=outputs, outputs=outputs, name="n", output_dir=str(tmp_path), reward_model=str(model), **others
            )
        )

    run(limit=2, template_date=FIRST)
    clock.moment = SECOND
    assert run(limit=2).status == "already complete"
    extended = run()
    assert extended.n == 4
    assert json.loads(extended.meta.read_text())["fingerprint"]["template_date"] == FIRST
