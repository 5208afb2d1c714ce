"""Settings: what flags, a file, a recipe and the defaults give together, and which values are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from expo import config, config_files, recipes
from expo.cli import program as cli
from expo.config import (
    CompareConfig,
    ExtrapolateConfig,
    GenerateConfig,
    InspectConfig,
    ReportConfig,
    ScoreConfig,
    SweepConfig,
)
from expo.errors import InputError
from expo.verbs.extrapolate import Extrapolated

RECIPE = """
[recipe]
source = "the paper, table 1"

[extrapolate]
sft = "recipe/sft"
dpo = "recipe/dpo"
alpha = [0.5]
dtype = "bfloat16"
exclude = ["recipe"]
missing = "copy-dpo"
"""


@pytest.fixture
def resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ExtrapolateConfig]:
    """The config object that `expo extrapolate` makes of flags, with a recipe named `known` at hand."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "Known.toml").write_text(RECIPE)
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "recipes")
    seen: list[ExtrapolateConfig] = []
    monkeypatch.setattr("expo.verbs.extrapolate.run", lambda settings: seen.append(settings) or Extrapolated())

    def run(*args: str, toml: str | None = None) -> ExtrapolateConfig:
        if toml is not None:
            (tmp_path / "expo.toml").write_text(toml)
            args = (*args, "--config", str(tmp_path / "expo.toml"))
        assert cli.run(["extrapolate", *args]) == 0
        return seen.pop()

    return run


BOTH = ("--sft", "s", "--dpo", "d")


def test_defaults_are_those_of_the_class(resolve: Callable[..., ExtrapolateConfig]) -> None:
    assert resolve(*BOTH, "--alpha", "0.3") == ExtrapolateConfig(sft="s", dpo="d", alpha=(0.3,))


def test_a_file_gives_every_setting(resolve: Callable[..., ExtrapolateConfig]) -> None:
    values = {
        "sft": "s", "dpo": "d", "alpha": (0.1, 2.0), "output": "o", "device": "cpu", "dtype": "float32", "workers": 3,
        "exclude": ("a", "b"), "missing": "copy-dpo", "allow_nonfinite": True, "fsync": False, "overwrite": True,
        "push_to_hub": "me/x-{alpha}", "private": True,
        "rule": "another", "alpha_for": ("mlp=0.5", "a=b=-1e-1"), "max_shard_size": "5GB", "vocab": "common",
        "allow_pickle": True, "verify": True, "stream_sft": True, "data_parallel": 2, "ray": "auto",
    }  # fmt: skip
    others = {"dry_run", "part", "join", "checkpoint", "target_step", "as_adapter", "rank"}  # exclude others
    assert values.keys() | others == config_files.field_names("extrapolate"), "a new setting belongs here too"
    lines = [f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in values.items()]
    assert resolve(toml="[extrapolate]\n" + "\n".join(lines)) == ExtrapolateConfig(**values)
    course = 'sft = "s"\ncheckpoint = ["200=b", "100=a"]\ntarget-step = [300, 400]\n'
    made = resolve(toml=f"[extrapolate]\n{course}")
    assert made == ExtrapolateConfig(sft="s", checkpoint=("200=b", "100=a"), target_step=(300.0, 400.0))
    assert (made.dpo, made.alpha, made.rule_name) == ("b", (0.5, 1.0), "relex")


def test_a_flag_beats_the_file_beats_the_recipe_beats_the_default(resolve: Callable[..., ExtrapolateConfig]) -> None:
    toml = '[extrapolate]\ndtype = "float16"\nexclude = ["file"]\nalpha = [0.2]\n'
    made = resolve("--recipe", "known", "--dtype", "float32", toml=toml)
    assert made == ExtrapolateConfig(
        sft="recipe/sft", dpo="recipe/dpo", alpha=(0.2,), dtype="float32", exclude=("file",), missing="copy-dpo"
    )
    assert made.workers is None


def test_the_order_of_config_and_recipe_on_the_command_line_does_not_matter(
    resolve: Callable[..., ExtrapolateConfig], tmp_path: Path
) -> None:
    (tmp_path / "one.toml").write_text("[extrapolate]\nalpha = [0.2]\n")
    one, two = ("--config", str(tmp_path / "one.toml")), ("--recipe", "KNOWN")
    assert resolve(*one, *two) == resolve(*two, *one)
    assert resolve(*one, *two).alpha == (0.2,)


def test_the_commands_table_beats_common(resolve: Callable[..., ExtrapolateConfig]) -> None:
    toml = '[common]\ndevice = "cpu"\ndtype = "float16"\nlimit = 3\n[extrapolate]\ndtype = "float32"\nalpha = [1]\n'
    made = resolve(*BOTH, toml=toml)
    assert (made.device, made.dtype) == ("cpu", "float32")


def test_a_single_value_may_stand_for_a_list(resolve: Callable[..., ExtrapolateConfig]) -> None:
    assert resolve(*BOTH, toml="[extrapolate]\nalpha = 0.3\n").alpha == (0.3,)


def test_a_flag_can_turn_off_what_a_file_turns_on(resolve: Callable[..., ExtrapolateConfig]) -> None:
    assert resolve(*BOTH, "--fsync", toml="[extrapolate]\nalpha = [1]\nfsync = false\n").fsync


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[extrapolate]\nalhpa = 1", "unknown key 'alhpa' in [extrapolate]; did you mean 'alpha'?"),
        ("[extrapolate]\nallow-nonfinit = true", "did you mean 'allow_nonfinite'?"),
        ("[extrapolate]\ntemperature = 1", "unknown key 'temperature' in [extrapolate]"),
        ("[common]\nseeed = 1", "unknown key 'seeed' in [common]; did you mean 'seed'?"),
        ("[extrapolat]\nalpha = 1", "unknown table [extrapolat]; did you mean 'extrapolate'?"),
        ("[recipe]\nsource = 'x'", "unknown table [recipe]"),
        (
            "alpha = 1",
            "'alpha' is outside any table; move it into [common] or a command's, such as [extrapolate]",
        ),
        ('[extrapolate]\noutput = "a\\u0000b"', "'output' in [extrapolate] contains a NUL character, which no path"),
        ('[extrapolate]\nexclude = ["a", "a\\u0000b"]', "'exclude' in [extrapolate] contains a NUL character"),
        (
            "[extrapolate]\nalpha = [0.1, true]",
            "'alpha' in [extrapolate] expects a value, not true or false",
        ),
        ("[extrapolate]\noutput = ['a', 'b']", "'output' in [extrapolate] expects one value, not ['a', 'b']"),
        ("[extrapolate]\nsft.path = 'a'", "'sft' in [extrapolate] expects one value"),
        (
            "[extrapolate]\nexclude = [['a']]",
            "'exclude' in [extrapolate] expects a value or a flat list of values, not",
        ),
        (
            "[extrapolate]\nexclude = {a = 1}",
            "'exclude' in [extrapolate] expects a value or a flat list of values, not",
        ),
        ("[extrapolate", "is not valid TOML"),
        ("[extrapolate]\nalpha = 1\nalpha = 2", "is not valid TOML"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, toml: str, message: str) -> None:
    (tmp_path / "expo.toml").write_text(toml)
    with pytest.raises(InputError) as caught:
        config_files.load_tables(tmp_path / "expo.toml")
    assert message in str(caught.value)
    assert str(tmp_path / "expo.toml") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "expo.toml").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        config_files.load_tables(tmp_path / "expo.toml")


@pytest.mark.parametrize(
    ("toml", "named"),
    [
        ("alpha = ['half']", "got 'half', from --config"),
        ("alpha = [nan]", "--alpha must be a finite number"),
        ("alpha = 1\nworkers = 'two'", "got 'two', from --config"),
        ("alpha = 1\nworkers = -1", "--workers must be positive, not -1"),
        ("alpha = 1\ndtype = 'int8'", "'int8' is not one of"),
        ("alpha = 1\nfsync = 'maybe'", "got 'maybe', from --config"),
        ("alpha = 1\nexclude = ['(']", "--exclude '(' is not a regular expression"),
        ("alpha = 1\nalpha_for = ['(=1']", "--alpha-for '(' is not a regular expression"),
        ("alpha = 1\nalpha_for = ['mlp']", "--alpha-for must be REGEX=A with a finite number A, such as"),
        ("alpha = 1\nalpha_for = ['mlp=x']", "such as 'self_attn=0.5', not 'mlp=x'"),
        ("alpha = 1\nalpha_for = ['mlp=nan']", "such as 'self_attn=0.5', not 'mlp=nan'"),
        ("alpha = 1\nalpha_for = ['mlp=1e39']", "--alpha-for 'mlp' 1e+39 exceeds the range of float32"),
        ("alpha = 1\nalpha_for = ['=1']", "such as 'self_attn=0.5', not '=1'"),
        ("alpha = 1\nmax_shard_size = '5'", "--max-shard-size must be a size such as 500MB or 5GB, not '5'"),
        ("alpha = 1\nmax_shard_size = '0GB'", "--max-shard-size must be a size such as 500MB or 5GB, not '0GB'"),
        ("alpha = 1\nmax_shard_size = '-1GB'", "not '-1GB'"),
        (
            f"alpha = 1\nmax_shard_size = '{10**400}GB'",
            "--max-shard-size must be a size such as 500MB or 5GB, not '1000",
        ),
        ("alpha = 1\nvocab = 'all'", "vocab"),
    ],
)
def test_a_files_values_are_checked_as_flags_are(
    tmp_path: Path, toml: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "expo.toml").write_text(f"[extrapolate]\n{toml}")
    assert cli.run(["extrapolate", *BOTH, "--config", str(tmp_path / "expo.toml")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert named in err


GENERATE = {"task": "alpaca", "model": "m"}
SCORE = {"task": "alpaca", "name": "n"}
COMPARE = {"runs": ("a", "b")}
EXTRAPOLATE = {"sft": "s", "dpo": "d", "alpha": (0.5,)}
INSPECT = {"sft": "s", "dpo": "d"}
VALID = {
    ExtrapolateConfig: EXTRAPOLATE,
    GenerateConfig: GENERATE,
    InspectConfig: INSPECT,
    ScoreConfig: SCORE,
    CompareConfig: COMPARE,
    ReportConfig: COMPARE,
    SweepConfig: INSPECT,
}

OUT_OF_RANGE = [
    (ExtrapolateConfig, {**EXTRAPOLATE, "alpha": ()}, "--alpha is missing"),
    (ExtrapolateConfig, {**EXTRAPOLATE, "alpha": (float("inf"),)}, "--alpha must be a finite number, not inf"),
    (ExtrapolateConfig, {**EXTRAPOLATE, "alpha": (0.0, -0.0)}, "given more than once"),
    (ExtrapolateConfig, {**EXTRAPOLATE, "device": "cuda:x"}, "--device"),
    (ExtrapolateConfig, {**EXTRAPOLATE, "as_adapter": True, "rank": 0}, "--rank must be positive, not 0"),
    (ExtrapolateConfig, {**EXTRAPOLATE, "rank": 4}, "--rank is for an adapter: give --as-adapter, too"),
    (ExtrapolateConfig, {**EXTRAPOLATE, "missing": "skip"}, "--missing must be one of error, copy-dpo, not 'skip'"),
    (ExtrapolateConfig, {**EXTRAPOLATE, "private": True}, "--private needs --push-to-hub"),
    (ExtrapolateConfig, {**EXTRAPOLATE, "push_to_hub": "x"}, "must be a hub id such as me/my-model, not 'x'"),
    (ExtrapolateConfig, {**EXTRAPOLATE, "push_to_hub": "./a/b"}, "must be a hub id such as me/my-model, not './a/b'"),
    (
        ExtrapolateConfig,
        {**EXTRAPOLATE, "push_to_hub": "me/x@v1"},
        "must be a hub id such as me/my-model, not 'me/x@v1'",
    ),
    (
        ExtrapolateConfig,
        {**EXTRAPOLATE, "alpha": (-1.0,), "push_to_hub": "me/x-{alpha}"},
        "must be a hub id such as me/my-model, not 'me/x--1.0'",
    ),
    (
        ExtrapolateConfig,
        {**EXTRAPOLATE, "alpha": (0.1, 0.2), "push_to_hub": "me/x"},
        "--push-to-hub me/x takes one α; with several, put {alpha} in the name",
    ),
    (
        ExtrapolateConfig,
        {**EXTRAPOLATE, "dpo": "Me/X@main", "push_to_hub": "me/x"},
        "--push-to-hub me/x is an input; choose another repository",
    ),
    (SweepConfig, {**INSPECT, "data_parallel": 2}, "--data-parallel of a sweep needs --ray"),
    (SweepConfig, {**INSPECT, "data_parallel": 0, "ray": "auto"}, "--data-parallel must be 1 to"),
    (SweepConfig, {**INSPECT, "ray": " "}, "--ray is empty; give auto, or the cluster's address"),
    (GenerateConfig, {**GENERATE, "limit": 0}, "--limit must be positive, not 0"),
    (GenerateConfig, {**GENERATE, "temperature": -0.1}, "--temperature must be 0 or more"),
    (GenerateConfig, {**GENERATE, "temperature": float("nan")}, "--temperature must be 0 or more"),
    (GenerateConfig, {**GENERATE, "top_k": -2}, "--top-k"),
    (GenerateConfig, {**GENERATE, "top_p": 0.0}, "--top-p must lie in (0, 1], not 0.0"),
    (GenerateConfig, {**GENERATE, "top_p": 1.1}, "--top-p must lie in (0, 1], not 1.1"),
    (GenerateConfig, {**GENERATE, "presence_penalty": 2.1}, "--presence-penalty must lie in [-2, 2]"),
    (GenerateConfig, {**GENERATE, "frequency_penalty": -2.1}, "--frequency-penalty must lie in [-2, 2]"),
    (GenerateConfig, {**GENERATE, "max_tokens": 0}, "--max-tokens must be positive"),
    (GenerateConfig, {**GENERATE, "n": 0}, "--n must be positive"),
    (GenerateConfig, {**GENERATE, "name": "../x"}, "--name '../x' is not a plain file name"),
    (InspectConfig, {**INSPECT, "output": "x.jpg"}, "--output must be a picture (.png, .svg, .pdf), not 'x.jpg'"),
    (InspectConfig, {**INSPECT, "output": "folder"}, "--output must be a picture"),
    (InspectConfig, {**INSPECT, "device": "gpu"}, "--device must be auto, cpu, cuda or cuda:N, not 'gpu'"),
    (InspectConfig, {**INSPECT, "workers": 0}, "--workers must be positive, not 0"),
    (ScoreConfig, {**SCORE, "name": "a/b"}, "--name 'a/b' is not a plain file name"),
    (
        ScoreConfig,
        {**SCORE, "name": "mine.rows"},
        "--name 'mine.rows' has a suffix reserved for files beside an output",
    ),
    (ScoreConfig, {**SCORE, "name": ".hidden"}, "--name '.hidden' is not a plain file name"),
    (ScoreConfig, {**SCORE, "max_length": 0}, "--max-length must be positive"),
    (ScoreConfig, {**SCORE, "batch_tokens": 0}, "--batch-tokens must be positive"),
    (CompareConfig, {"runs": ("a",)}, "compare takes two or more runs, not 1: a baseline, and what to compare with it"),
    (CompareConfig, {"runs": ("a", "")}, "RUN is empty"),
    (CompareConfig, {"runs": ("a", "\udcff")}, "RUN '\\udcff' is not UTF-8"),
    (ReportConfig, {**COMPARE, "output": "r.json"}, "--output must end in .html, not 'r.json'"),
    (ReportConfig, {**COMPARE, "figures": ""}, "--figures is empty"),
    (CompareConfig, {**COMPARE, "flips": -1}, "--flips must be 0 to 1000000, not -1"),
]


@pytest.mark.parametrize(("kind", "values", "message"), OUT_OF_RANGE, ids=[case[2][:30] for case in OUT_OF_RANGE])
def test_python_users_are_checked_as_flags_are(kind: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        kind(**values)
    assert message in str(caught.value)


def test_the_papers_decoding() -> None:
    made = GenerateConfig(**GENERATE)
    assert (made.temperature, made.top_k, made.top_p) == (None, 50, 0.9)
    assert config.DEFAULT_TEMPERATURE == 0.7
    assert (made.presence_penalty, made.frequency_penalty) == (0.1, 0.1)
    assert (made.seed, made.max_tokens) == (42, 2048)
    assert ScoreConfig(**SCORE).reward_models == ("weqweasdas/RM-Mistral-7B",)


@pytest.mark.parametrize("kind", config.COMMANDS.values(), ids=config.COMMANDS.keys())
def test_settings_cannot_be_changed(kind: type) -> None:
    made = kind(**VALID[kind])
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.dry_run = True


def test_alphas_are_floats_however_they_come() -> None:
    assert list(map(repr, ExtrapolateConfig(sft="s", dpo="d", alpha=(1, 0.5)).alpha)) == ["1.0", "0.5"]


def test_each_alpha_goes_to_a_repository_of_its_own() -> None:
    both = ExtrapolateConfig(sft="s", dpo="d", alpha=(1, 0.5), push_to_hub="me/x-{alpha}")
    assert both.repositories == ("me/x-1.0", "me/x-0.5")
    assert ExtrapolateConfig(sft="s", dpo="d", alpha=(1,), push_to_hub="me/x").repositories == ("me/x",)
    assert ExtrapolateConfig(sft="s", dpo="d", alpha=(1, 0.5)).repositories == ()


def test_every_shipped_recipe_makes_a_config() -> None:
    for name in recipes.names():
        recipe = recipes.load(name.upper())
        made = ExtrapolateConfig(
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in ({"alpha": [0.3]} | recipe.tables["extrapolate"]).items()
            }
        )
        assert (recipe.name, made.alpha) == (name, (0.3 if recipe.alpha is None else recipe.alpha,))
        assert InspectConfig(**recipe.tables["inspect"]) == InspectConfig(sft=made.sft, dpo=made.dpo)
        assert recipe.source


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [("keep", None), ("500MB", 500_000_000), ("5GB", 5_000_000_000), ("1.5 GiB", 3 << 29), ("7b", 7), ("2kb", 2000)],
)
def test_sizes(size: str, nbytes: int | None) -> None:
    settings = ExtrapolateConfig(sft="s", dpo="d", alpha=(1,), max_shard_size=size)
    assert settings.max_shard_bytes == nbytes


def test_the_last_equals_sign_counts() -> None:
    settings = ExtrapolateConfig(sft="s", dpo="d", alpha=(1,), alpha_for=("a=b=-0.0", "x=2"))
    assert settings.alphas_for == (("a=b", 0.0), ("x", 2.0))
    assert str(settings.alphas_for[0][1]) == "0.0"
