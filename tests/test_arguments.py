"""Settings as arguments: what a process of its own is given is what was resolved here."""

from __future__ import annotations

import dataclasses
import shlex

import pytest

from expo import config_files
from expo.arguments import arguments_of, shown
from expo.cli import program as cli
from expo.config import PAIR_SETTINGS, CompareConfig, GenerateConfig

OTHERWISE = {
    "task": "my prompts.jsonl", "model": "a/b@main", "overwrite": True, "dry_run": True, "output_dir": "-out",
    "limit": 3, "device": "cuda:1", "dtype": "float16", "chat_template": "t.jinja", "trust_remote_code": True,
    "name": "x y", "engine": "transformers", "engine_arg": ("a=1", "b={\"c\": 2}"), "dataset": "d",
    "system": "-You're 'brief'\n", "n": 2, "tensor_parallel": 2, "data_parallel": 3, "part": "1/3", "join": 3,
    "ray": "h:1", "template_date": "2024-03-01T10:00:00",
    "batch_tokens": 7, "temperature": 0.30000000000000004, "top_k": -1, "top_p": 0.1, "presence_penalty": -1.5,
    "frequency_penalty": 0.0, "seed": 0, "seed_mode": "shared", "max_tokens": 1, "stop_token_id": (1, 2),
    "sft": "c/d", "dpo": "-my dpo", "alpha": -0.5, "rule": "r", "alpha_for": ("a=1", "b c=2"), "exclude": ("norm",),
    "checkpoint": ("100=e", "200=-my dpo"), "target_step": 100.0,
    "missing": "copy-dpo", "vocab": "common", "allow_pickle": True, "allow_nonfinite": True,
    "base_url": "http://localhost:1/v1", "concurrency": 5, "space": "logits",
}  # fmt: skip
"""A value other than the default for every setting."""


@pytest.fixture
def resolved(monkeypatch):
    """The config object that `expo generate` makes of arguments."""
    seen = []

    class Told(Exception):
        pass

    def tell(settings: GenerateConfig):
        seen.append(settings)
        raise Told

    for verb in ("run", "plan"):
        monkeypatch.setattr(f"expo.verbs.generate.{verb}", tell)

    def run(arguments: list[str]) -> GenerateConfig:
        with pytest.raises(Told):
            cli.run(["generate", *arguments])
        return seen.pop()

    return run


def test_every_setting_is_handed_on(resolved):
    assert OTHERWISE.keys() == config_files.field_names("generate"), "a new setting belongs here too"
    alone = {"part": None, "join": None, "data_parallel": None, "ray": None}
    defaults = {field.name: field.default for field in dataclasses.fields(GenerateConfig)}
    no_rules = {name: defaults[name] for name in ("target_step", *PAIR_SETTINGS)}
    no_pair = {**no_rules, **{name: defaults[name] for name in ("sft", "dpo", "alpha", "space")}}
    for cut in alone:
        for source in (no_pair, {"model": None, "space": "weights"}, {"model": None, **no_rules}):
            made = GenerateConfig(**{**OTHERWISE, **alone, cut: OTHERWISE[cut], **source})
            assert resolved(arguments_of(made)) == made


def test_a_setting_that_a_file_changed_back_is_handed_on(resolved, tmp_path):
    """A flag may put back a default over a file's value; the file is not handed on, so the default holds."""
    (tmp_path / "expo.toml").write_text('[generate]\nmodel = "m"\ntemperature = 0.5\nseed = 7\n')
    made = resolved(["alpaca", "--config", str(tmp_path / "expo.toml"), "--temperature", "0.7"])
    assert (made.temperature, made.seed) == (0.7, 7)
    assert resolved(arguments_of(made)) == made


def test_the_shown_command_can_be_pasted(resolved):
    made = dataclasses.replace(GenerateConfig(task="a b.jsonl", model="m"), system="it's", part="0/2")
    words = shlex.split(shown("generate", made))
    assert words[:2] == ["expo", "generate"]
    assert resolved(words[2:]) == made


def test_several_words_without_a_flag():
    settings = CompareConfig(runs=("my run", "b.jsonl", "c"), task="alpaca", flips=3)
    words = arguments_of(settings)
    assert words == ["my run", "b.jsonl", "c", "--flips", "3", "--task", "alpaca"]
