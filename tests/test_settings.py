"""What a setting says of itself, and that a new one leaves the outputs there are as they are."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from expo.config import COMMANDS, ExtrapolateConfig, GenerateConfig, InspectConfig, ScoreConfig, ThetaConfig
from expo.engines import GENERATORS
from expo.errors import InputError
from expo.files import json_line
from expo.journal import Journal
from expo.settings import Fingerprint, Setting, absent_values, recorded, require_same, settings_of
from expo.verbs import extrapolate

RULES = {
    "rule": "linear",
    "alpha_for": [],
    "exclude": [],
    "missing": "error",
    "vocab": "error",
    "allow_nonfinite": False,
}
EVERYTHING = ("rows", "batches", "weights")
ABSENT = {
    ExtrapolateConfig(sft="s", dpo="d", alpha=(1,)): {
        **RULES, "as_adapter": False, "dtype": "auto", "max_shard_size": "keep", "rank": None,
    },
    ThetaConfig(sft="s", dpo="d", alpha=1): RULES,
    InspectConfig(sft="s", dpo="d"): {"rule": "linear"},
    ScoreConfig(task="alpaca", name="m"): {
        "dtype": "auto", "engine_arg": [], "batch_tokens": 16384, "max_length": None, "bos": "template",
    },
    GenerateConfig(task="alpaca", model="m"): {
        **RULES, "dtype": "auto", "engine_arg": [], "system": None, "n": 1, "temperature": None, "top_k": 50,
        "top_p": 0.9, "presence_penalty": 0.1, "frequency_penalty": 0.1, "seed": 42, "seed_mode": "shared",
        "max_tokens": 2048, "space": "weights",
        "stop_token_id": [], "batch_tokens": 16384,
    },
}  # fmt: skip
"""What outputs were made with that do not say; add to it, and never change a value."""


@pytest.mark.parametrize(("config", "values"), ABSENT.items(), ids=lambda one: type(one).__name__)
def test_what_outputs_that_do_not_say_were_made_with(config: object, values: dict[str, object]) -> None:
    assert absent_values(config, *EVERYTHING) == values


@pytest.mark.parametrize("kind", [*COMMANDS.values(), ThetaConfig])
def test_every_field_is_described_in_a_sentence(kind: type) -> None:
    settings = settings_of(kind)
    assert settings.keys() == {field.name for field in dataclasses.fields(kind)}
    assert all(one.help[0].isalpha() and one.help[-1] in ".]" for one in settings.values())


def test_what_changes_an_output_says_what_there_was_before_it() -> None:
    with pytest.raises(TypeError, match="`absent` belongs to"):
        Setting("How.", changes="rows")
    with pytest.raises(TypeError, match="`absent` belongs to"):
        Setting("How.", absent=1)


@dataclass(frozen=True, kw_only=True)
class WithBlend(ExtrapolateConfig):
    """A later version's, with one setting more."""

    blend: Annotated[str, Setting("How layers are blended.", changes="weights", absent="none")] = "none"


def test_a_new_setting_never_makes_old_outputs_made_with_other_settings(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Whether they leave out what is absent, or hold every value of then."""
    about = {"sft": str(pair[0]), "dpo": str(pair[1]), "alpha": (0.5,), "output": str(tmp_path / "out"), "fsync": False}
    extrapolate.run(ExtrapolateConfig(**about))
    file = tmp_path / "out" / "expo.json"
    manifest = json.loads(file.read_text())
    assert manifest["fingerprint"].keys() == {"format", "alpha", "sft", "dpo"}
    older = manifest["fingerprint"] | recorded(ExtrapolateConfig(**about), "weights")
    assert older.keys() > manifest["fingerprint"].keys()
    for fingerprint in (manifest["fingerprint"], older):
        file.write_text(json.dumps(manifest | {"fingerprint": fingerprint}))
        for kind in (ExtrapolateConfig, WithBlend):
            assert [one.status for one in extrapolate.run(kind(**about))] == ["already complete"]
        with pytest.raises(InputError, match=r"a different blend \('none' then, 'cubic' now\)"):
            extrapolate.run(WithBlend(**about, blend="cubic"))
        with pytest.raises(InputError, match=r"a different dtype \('auto' then, 'float16' now\)"):
            extrapolate.run(ExtrapolateConfig(**about, dtype="float16"))


# --- fingerprints -------------------------------------------------------------------------------------------------

ABSENT_THEN = {"seed": 42, "stop": []}


def test_the_seed_mode_of_old_outputs_depends_on_the_engine() -> None:
    config = GenerateConfig(task="alpaca", model="m")
    assert absent_values(config, "rows")["seed_mode"] == "shared"
    assert [GENERATORS[name].absent for name in ("vllm", "openai", "transformers")] == [{}, {}, {"seed_mode": "row"}]
    with pytest.raises(InputError, match=r"a different seed-mode \('shared' then, 'row' now\)"):
        require_same("m.json", {}, Fingerprint(recorded(config, "rows"), absent_values(config, "rows")))


@pytest.mark.parametrize(
    ("now", "old", "same"),
    [
        ({"n": 1, "seed": 42}, {"n": 1}, True),
        ({"n": 1, "seed": 42}, {"n": 1, "seed": 42, "stop": []}, True),
        ({"n": 1, "seed": 7}, {"n": 1, "seed": 7, "stop": []}, True),
        ({"n": 1, "seed": 7}, {"n": 1}, False),
        ({"n": 1}, {"n": 1, "seed": 7}, False),
        ({"n": 1}, {"n": 2}, False),
        ({"n": 1}, {"n": 1, "stop": [2]}, False),
        ({"n": 1}, None, False),
    ],
)
def test_fingerprints_are_equal_where_they_say_the_same(now: dict, old: dict | None, same: bool) -> None:
    new = Fingerprint(now, ABSENT_THEN)
    assert (new == old, old == new, new != old, old != new) == (same, same, not same, not same)
    assert json.loads(json_line(new)).items() <= now.items()
    if same:
        require_same("m.json", old, new)
    elif old is not None:
        with pytest.raises(InputError, match="was made with a different"):
            require_same("m.json", old, new)


def test_a_journal_with_every_value_is_continued(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", {"fingerprint": {"n": 1, "seed": 42, "stop": []}}) as journal:
        journal.append([{"row": 0}])
    with Journal(tmp_path / "j", {"fingerprint": Fingerprint({"n": 1}, ABSENT_THEN)}) as journal:
        assert journal.rows == [{"row": 0}]
    with Journal(tmp_path / "j", {"fingerprint": Fingerprint({"n": 1, "seed": 7}, ABSENT_THEN)}) as journal:
        assert journal.rows == []
