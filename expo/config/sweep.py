"""The settings of `expo sweep`: the pair, its candidates for α, how its answers are sampled, and who scores them."""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, fields
from typing import Annotated, Any, Literal, TypeAlias

from expo.config.course import shown_step, step_of
from expo.config.engines import require_engine_args, require_tensor_parallel
from expo.config.logit_space import LOGITS, require_space
from expo.config.pair import NO_DPO, PAIR_SETTINGS, Dpo, Dtype, PairConfig, Sft
from expo.config.parts import ClusterConfig
from expo.config.rows import DEFAULT_REWARD_MODEL, Bos, GenerateConfig, ScoreConfig, checked_reward_models
from expo.config.sampling import SamplingConfig
from expo.files import is_utf8, shown
from expo.settings import Setting, require, require_alpha, require_choice, require_device, require_text

Search: TypeAlias = Literal["grid", "race", "modules"]
Switch: TypeAlias = Literal["auto", "reload", "adapter"]

GRID = (0.1, 0.2, 0.3, 0.4, 0.5)
"""The paper's candidates for fully trained models."""
SFT_ALPHA = -1.0
"""The α of θ_sft itself."""

REWARD = "reward_"
"""Prefix of the reward model's settings, which `expo score` has without it."""


@dataclass(frozen=True, kw_only=True)
class RaceConfig:
    """The settings that only a race has."""

    HEADING = "The races (--search race, modules)"

    slice: Annotated[
        int | None,
        Setting(
            "Prompts in the race's first look, and added at each later one. [default: a tenth, at least 10]",
            metavar="N",
        ),
    ] = None
    confirm: Annotated[
        float, Setting("Share of the prompts set aside to confirm the α that the race finds.", metavar="SHARE")
    ] = 0.3
    confidence: Annotated[
        float, Setting("Probability that the race drops no α that is as good as the one it trails.", metavar="P")
    ] = 0.95
    indifference: Annotated[
        float,
        Setting(
            "End the race once choosing its leader is expected to lose less than this, in standard deviations of the "
            "paired difference.",
            metavar="SD",
        ),
    ] = 0.05
    refine: Annotated[
        bool, Setting("Let the race add α between the leader and its neighbours, and beyond the ends.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class RewardsConfig:
    """Who scores: `expo score`'s settings, with a prefix."""

    HEADING = "The reward model"

    reward_model: Annotated[
        tuple[str, ...],
        Setting(
            "A reward model: a directory, hub id, or id@revision; repeatable: the first decides, and each of the "
            f"others must see the gain as well. [default: {DEFAULT_REWARD_MODEL}]",
            metavar="RM",
        ),
    ] = ()
    reward_engine: Annotated[
        str, Setting("Engine that runs the reward model; auto as in `expo score`.", metavar="auto|vllm|transformers")
    ] = "auto"
    reward_device: Annotated[
        str, Setting("Device of the reward model (transformers).", metavar="auto|cpu|cuda[:i]")
    ] = "auto"
    reward_dtype: Annotated[Dtype, Setting("Data type the reward model runs in.")] = "auto"
    reward_engine_arg: Annotated[
        tuple[str, ...],
        Setting("Argument passed to the reward model's engine; repeatable.", metavar="KEY=VALUE"),
    ] = ()
    reward_tensor_parallel: Annotated[
        int | None, Setting("Number of GPUs for the reward model (vllm). [default: as --dry-run shows]", metavar="N")
    ] = None
    reward_batch_tokens: Annotated[int, Setting("Token budget of one batch of the reward model.", metavar="N")] = 16384
    reward_max_length: Annotated[
        int | None, Setting("Maximum conversation length of the reward model, in tokens.", metavar="N")
    ] = None
    reward_chat_template: Annotated[
        str | None, Setting("Jinja file to use instead of the reward model's own chat template.", metavar="FILE")
    ] = None
    reward_bos: Annotated[Bos, Setting("Like --bos of `expo score`.")] = "auto"


@dataclass(frozen=True, kw_only=True)
class SweepConfig(ClusterConfig, RaceConfig, RewardsConfig, PairConfig, SamplingConfig):
    """`expo sweep`: find the α whose answers a reward model prefers, with engines that go from one α to the next."""

    sft: Sft
    dpo: Dpo = ""
    alpha: Annotated[
        tuple[float, ...],
        Setting(
            "A candidate for α; repeatable. α = 0 is always measured as well. [default: 0.1 0.2 0.3 0.4 0.5]",
            metavar="A",
        ),
    ] = ()
    target_step: Annotated[
        tuple[float, ...],
        Setting(
            "With --checkpoint: a candidate for the step to extrapolate to, in place of α; repeatable. The last "
            "checkpoint itself is always measured as well.",
            metavar="T",
        ),
    ] = ()
    with_sft: Annotated[bool, Setting("Also measure SFT itself, which is α = −1, for reference.")] = False
    search: Annotated[
        Search,
        Setting(
            "grid: every α answers every prompt; race: α that fall behind are dropped, and the best one is tested on "
            "prompts set aside, for at most half of the tokens; modules (exploratory): after a race, further ones give "
            "attention, MLP, embeddings and parts of the depth α of their own, tested against one α for all."
        ),
    ] = "grid"
    switch: Annotated[
        Switch,
        Setting(
            "How the policy's engine goes from one α to the next: reload gives it other weights; adapter, for a LoRA "
            "pair with vllm, has all α in one batch, each as an adapter that is applied to SFT; auto is adapter on a "
            "GPU where a test finds it as fast, with the same answers."
        ),
    ] = "auto"
    task: Annotated[
        str, Setting("ultrafeedback, alpaca, mtbench, or a .jsonl/.json/.parquet/.csv file.", metavar="TASK")
    ] = "ultrafeedback"
    output: Annotated[
        str | None,
        Setting("Folder for sweep.json, sweep.png, outputs_<task>/ and rewards_<task>/. [default: sweeps/<DPO name>]",
                metavar="DIR"),
    ] = None  # fmt: skip
    likelihood: Annotated[
        str | None,
        Setting(
            "Exploratory: read preference pairs under every θ(α) instead of generating and scoring answers: which is "
            "likelier, chosen or rejected. A .jsonl/.json/.parquet/.csv file with prompt, chosen and rejected, or a "
            "hub data set as id[@revision][:split] (transformers).",
            metavar="PAIRS",
        ),
    ] = None
    any_pair: Annotated[bool, Setting("Sweep the pair even if `expo inspect` finds it unsuited.")] = False
    write: Annotated[bool, Setting("Write the checkpoint of the chosen α at the end.")] = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: A value is out of its range; the message names the flag.
        """
        super().__post_init__()
        self._settle_course(self.dpo)
        require(bool(self.dpo), NO_DPO)
        for spelling, path in (("--sft", self.sft), ("--dpo", self.dpo), ("--output", self.output or "")):
            require(is_utf8(path), f"{spelling} {shown(path)} is not UTF-8; rename the folder")
        object.__setattr__(self, "alpha", self._alphas_of_steps(self.alpha, self.target_step))
        for alpha in self.alpha:
            require_alpha(alpha)
        object.__setattr__(self, "alpha", tuple(float(alpha) + 0.0 for alpha in self.alpha))  # −0.0 becomes 0.0
        for name, values in (("--target-step", self.target_step), ("--alpha", self.alpha)):
            twice = next((value for value in values if values.count(value) > 1), None)
            require(twice is None, f"{name} {twice} is given more than once")
        self._require_candidate()
        require_choice("--search", self.search, Search)
        require_choice("--switch", self.switch, Switch)
        self._require_race_settings()
        self._require_modules()
        self._require_likelihood()
        self._require_space()
        require(
            not (self.checkpoint and self.alpha_for),
            "a sweep takes no --alpha-for beside --checkpoint: --exclude keeps tensors as the last checkpoint has them",
        )
        moved = next((f"{pattern}={alpha:g}" for pattern, alpha in self.alphas_for if alpha), None)
        require(
            moved is None,
            f"--alpha-for {moved} would also change α = 0, which in a sweep is DPO itself: use PATTERN=0 to keep "
            "tensors as DPO has them, or `expo extrapolate --alpha-for` for any other mix",
        )
        object.__setattr__(self, "reward_model", checked_reward_models(self.reward_model))
        require_choice("--reward-dtype", self.reward_dtype, Dtype)
        require_choice("--reward-bos", self.reward_bos, Bos)
        require_device(self.reward_device, "--reward-device")
        require_engine_args("--reward-engine-arg", self.reward_engine_arg)
        require_tensor_parallel("--reward-tensor-parallel", self.reward_tensor_parallel)
        for flag, size in (
            ("--reward-batch-tokens", self.reward_batch_tokens),
            ("--reward-max-length", self.reward_max_length),
        ):
            require(size is None or size > 0, f"{flag} must be positive, not {size}")
        require_text("--task", self.task)
        self._require_cluster_settings()
        self._require_pair_settings()

    def _require_candidate(self) -> None:
        given, beyond = ["--alpha", *(f"{alpha:g}" for alpha in self.alpha)], "an α above 0 to compare with 0"
        if self.target_step:
            given, beyond = ["--target-step", *map(shown_step, self.target_step)], "one beyond the last --checkpoint"
        require(max(self.alphas) > 0, f"{' '.join(given)} leaves nothing to choose: give {beyond}")

    def _require_space(self) -> None:
        require_space(self, self.space)
        if self.space == LOGITS:
            require(self.switch != "adapter", "--switch adapter is about weights, and --space logits combines none")
            require(not self.write, "--write cannot be combined with --space logits, of which there is no checkpoint")

    def _require_race_settings(self) -> None:
        if self.search == "grid":
            given = next((one for one in fields(RaceConfig) if _is_given(self, one)), None)
            require(
                given is None,
                f"--{given.name if given else ''} needs --search race: add it, or leave this out",
            )
            return
        require(self.slice is None or self.slice > 1, f"--slice must be 2 prompts or more, not {self.slice}")
        require(
            0.01 <= self.confirm < 0.5,  # what confirms a race may cost its share of the grid by itself
            f"--confirm must be 0.01 or more and less than 0.5, not {self.confirm}",
        )
        require(0 < self.confidence < 1, f"--confidence must lie between 0 and 1, not {self.confidence}")
        require(
            math.isfinite(self.indifference) and self.indifference >= 0,
            f"--indifference must be 0 or more, not {self.indifference}",
        )
        candidates = [alpha for alpha in self.alphas if alpha > 0]
        require(
            len(candidates) > 1 or self.refine or self.search == "modules",
            f"α = {candidates[0]:g} alone needs no race: give another --alpha, --refine, or --search grid",
        )

    def _require_modules(self) -> None:
        """Refuse settings that a search over modules has no place for."""
        if self.search != "modules":
            return
        refused = {
            "--refine": self.refine,
            "--with-sft": self.with_sft,
            "--alpha-for": bool(self.alpha_for),
            "--checkpoint": bool(self.checkpoint),
            "--switch adapter": self.switch == "adapter",
            "--ray": self.ray is not None,
            "--space logits": self.space == LOGITS,
            "a second --reward-model": len(self.reward_model) > 1,
            "an --alpha below 0": min(self.alphas) < 0,
        }
        given = next((flag for flag, is_given in refused.items() if is_given), None)
        require(given is None, f"--search modules does not take {given}: leave it out, or use --search race")

    def _require_likelihood(self) -> None:
        """Refuse settings that nothing is left to do for where pairs are read: of rewards, of a race, of engines."""
        if self.likelihood is None:
            return
        require_text("--likelihood", self.likelihood)
        own = {field.name for field in (*fields(RewardsConfig), *fields(RaceConfig))}
        own |= {"search", "switch", "task", "dataset", "system", "n", "space", "write", "data_parallel", "ray"}
        given = next((one for one in fields(self) if one.name in own and _is_given(self, one)), None)
        require(
            given is None,
            f"--{given.name.replace('_', '-') if given else ''} has no meaning with --likelihood, which generates and "
            "scores nothing and chooses no checkpoint: leave one of the two out",
        )

    @property
    def alphas(self) -> tuple[float, ...]:
        """Every α that is measured, in order: 0, the candidates, and −1 with `with_sft`."""
        candidates = self.alpha or GRID
        return tuple(sorted({0.0, *candidates, *([SFT_ALPHA] if self.with_sft else [])}))

    @property
    def reward_models(self) -> tuple[str, ...]:
        """The reward models, the one that decides first."""
        return self.reward_model or (DEFAULT_REWARD_MODEL,)

    def generating(self, alpha: float, output_dir: str, **changes: object) -> GenerateConfig:
        """The settings of `expo generate` for one α.

        Args:
            alpha: The α.
            output_dir: The sweep's folder.
            changes: Settings that differ from the sweep's.
        """
        names = (field.name for field in fields(SamplingConfig))
        own = {**self.theta_settings(alpha), **{name: getattr(self, name) for name in names}}
        settings: dict[str, Any] = {**own, "dry_run": False, **changes}
        return GenerateConfig(task=self.task, output_dir=output_dir, **settings)

    def theta_settings(self, alpha: float) -> dict[str, Any]:
        """The settings of one θ(α).

        Of a training run, α = 0 is the last checkpoint itself and −1 the start, as of a pair; others are on its lines.
        """
        own: dict[str, Any] = {name: getattr(self, name) for name in PAIR_SETTINGS}
        pair = {"sft": self.sft, "dpo": self.dpo, "alpha": alpha, **own}
        if self.last_step is None:
            return pair
        if alpha in (0.0, SFT_ALPHA):
            return {**pair, "checkpoint": (), "rule": None}
        return {**pair, "target_step": step_of(alpha, self.last_step)}

    def scoring(self, name: str, output_dir: str, **changes: object) -> ScoreConfig:
        """The settings of `expo score` for the output of this name.

        Args:
            name: The output's name.
            output_dir: The sweep's folder.
            changes: Settings that differ from the sweep's.
        """
        own = {
            field.name.removeprefix(REWARD): getattr(self, field.name)
            for field in fields(self)
            if field.name.startswith(REWARD) and field.name != "reward_model"
        }
        settings: dict[str, Any] = {**own, **changes}
        return ScoreConfig(
            task=self.task,
            name=name,
            output_dir=output_dir,
            reward_model=self.reward_models,
            trust_remote_code=self.trust_remote_code,
            overwrite=self.overwrite,
            **settings,
        )


def _is_given(config: SweepConfig, setting: Field[Any]) -> bool:
    return bool(getattr(config, setting.name) != setting.default)
