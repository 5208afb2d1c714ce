"""A pair of checkpoints, found, checked and planned: the first step of everything that computes θ(α).

`extrapolate.py` writes the plan's tensors as files; `tensors.py` gives them to an engine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from expo.checkpoint.folder import Checkpoint, Location, find_folder, is_adapter, source_fingerprint
from expo.checkpoint.hub import locate
from expo.checkpoint.pickled import read_source
from expo.checkpoint.remote import locate_remote
from expo.checkpoint.tokens import require_same_tokens
from expo.config import Dtype, ExtrapolateConfig, PairConfig, ThetaConfig
from expo.config.course import CourseConfig, step_of
from expo.errors import InputError
from expo.files import Row
from expo.theta.adapter.folders import output_side_files, require_base
from expo.theta.decide_trajectory import plan_adapters, plan_trajectory
from expo.theta.names import theta_name
from expo.theta.pair_checks import check_pair, check_steps, check_target
from expo.theta.plan import Course, PairPlan, PairSettings
from expo.theta.rules import DEFAULT_RULE, RULES, require_rule
from expo.theta.trajectory import LINES, require_line

SIDES = ("sft", "dpo")

log = logging.getLogger(__name__)


def find_pair(config: ThetaConfig | ExtrapolateConfig) -> tuple[Location, Location]:
    """Find both models, fetching what is needed.

    Raises:
        InputError: One of them does not exist, or no rule has that name.
        EnvironmentFailure: The hub cannot be reached.
    """
    _look_at_course(config)  # before anything is fetched
    if isinstance(config, ExtrapolateConfig) and config.stream_sft:
        return _find_streamed(config)
    if isinstance(config, ExtrapolateConfig) and config.as_adapter and config.rank is None:
        return _find_base(config), find_folder(config.dpo) or locate(config.dpo, pickled=config.allow_pickle)
    sft = find_folder(config.sft) or locate(config.sft, weights_only=True, pickled=config.allow_pickle)
    dpo = find_folder(config.dpo) or locate(config.dpo, pickled=config.allow_pickle)
    if is_adapter(dpo.path):  # then SFT's config and other side files are θ(α)'s
        sft = find_folder(config.sft) or locate(config.sft, pickled=config.allow_pickle)
    return sft, dpo


def require_rule_for(config: CourseConfig) -> None:
    """Refuse a rule that is none for these models.

    Raises:
        InputError: It is not; the message lists the names.
    """
    if config.course:
        require_line(config.rule, len(config.course))
    elif config.rule in LINES and config.rule not in RULES:
        raise InputError(f"--rule {config.rule} is for a training run: give its --checkpoint STEP=MODEL")
    else:
        require_rule(config.rule_name)


def _look_at_course(config: ThetaConfig | ExtrapolateConfig) -> None:
    """Refuse a rule that is none for these models, and warn of a far target."""
    require_rule_for(config)
    last = config.last_step
    for alpha in config.alpha if isinstance(config.alpha, tuple) else (config.alpha,):
        if last is not None:
            check_target(step_of(alpha, last), last)


def find_earlier(config: CourseConfig, *, allow_pickle: bool) -> tuple[Location, ...]:
    """The checkpoints of a training run but the last, which is θ_dpo; none for a pair.

    Raises:
        InputError: One of them does not exist.
        EnvironmentFailure: The hub cannot be reached.
    """
    models = [model for _, model in config.course[:-1]]
    return tuple(find_folder(model) or locate(model, weights_only=True, pickled=allow_pickle) for model in models)


def _find_base(config: ExtrapolateConfig) -> Location:
    """SFT of an adapter that is scaled: of its weights the headers do, and tensors that the adapter stores whole."""
    if (local := find_folder(config.sft)) is not None:
        return local
    if config.verify or config.allow_pickle:
        return locate(config.sft, weights_only=True, pickled=config.allow_pickle)
    return locate_remote(config.sft, pickled=False)


def _find_streamed(config: ExtrapolateConfig) -> tuple[Location, Location]:
    """As `find_pair`, with SFT's weights left on the hub."""
    if config.verify:
        raise InputError(
            "--verify checksums SFT's files, which --stream-sft does not download: leave out one of the two"
        )
    sft = locate_remote(config.sft, pickled=config.allow_pickle)
    dpo = find_folder(config.dpo) or locate(config.dpo, pickled=config.allow_pickle)
    if is_adapter(dpo.path):
        raise InputError(f"--stream-sft cannot merge an adapter, which {dpo.label} is: leave out --stream-sft")
    return sft, dpo


def pair_settings(
    config: PairConfig, alphas: Iterable[float], *, dtype: Dtype = "auto", max_shard_bytes: int | None = None
) -> PairSettings:
    """How a pair is combined, from a command's settings."""
    several = len(config.course) > 1
    steps = tuple(step for step, _ in config.course)
    return PairSettings(
        alphas=tuple(alphas),
        rule=DEFAULT_RULE if config.course else config.rule_name,
        course=Course(config.rule_name, steps) if several else None,
        alpha_for=config.alphas_for,
        exclude=config.exclude,
        copy_missing=config.missing == "copy-dpo",
        common_vocabulary=config.vocab == "common",
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        allow_nonfinite=config.allow_nonfinite,
    )


def plan_located(
    sft: Location,
    dpo: Location,
    settings: PairSettings,
    *,
    allow_pickle: bool,
    earlier: Sequence[Location] = (),
) -> PairPlan:
    """Decide from headers what happens to every tensor, and warn about what is dropped.

    Args:
        sft: θ_sft, or what a training run began with.
        dpo: θ_dpo, or the run's last checkpoint.
        settings: How to combine them.
        allow_pickle: Whether weights that exist only as pickles are read.
        earlier: The run's other checkpoints, in the order of `settings.course.steps`.

    Raises:
        InputError: The checkpoints are damaged or do not match, or nothing would be extrapolated.
    """
    pair = _plan_weights(sft, (*earlier, dpo), settings, allow_pickle)
    if not pair.has_change:
        raise InputError(f"no tensor would be extrapolated: every θ(α) would be a copy of {dpo.label}")
    common = pair.vocabulary.common if pair.vocabulary else 0
    require_same_tokens(sft.path, dpo.path, common, needed=pair.extrapolates_tokens)
    _say(pair, sft)
    return pair


def warn_of_dequantized(sides: Mapping[str, str]) -> None:
    """Say which models are dequantized.

    Args:
        sides: What each is in the pair, and how it is stored.
    """
    for side, stored in sides.items():
        log.warning(
            "%s is quantized (%s) and dequantized to bfloat16: its rounding errors are part of Δ, and grow with α",
            *(side.upper() if side in SIDES else side, stored),
        )


def _say(pair: PairPlan, sft: Location) -> None:
    """Log what is not the usual pair's."""
    warn_of_dequantized(pair.dequantized)
    count, share = pair.copied
    if count and pair.adapter is None:
        say = log.warning if pair.missing else log.info
        say("%d of %d tensors (%.2g %% of the weights) are copied from DPO", count, len(pair.dpo.tensors), 100 * share)
    if pair.renamed:
        log.warning("%d tensors have other names in %s, or are fused on one side only", pair.renamed, sft.label)
    for head in pair.untied:
        log.warning("%s has no %s of its own: DPO's is combined with its embedding", sft.label, head)
    if pair.dropped:
        log.warning("%d tensors are only in %s and dropped (%s …)", len(pair.dropped), sft.label, pair.dropped[0])
    if pair.vocabulary:
        rows = pair.vocabulary
        log.warning(
            "vocabularies differ (SFT %d, DPO %d): %d rows are extrapolated, %d copied from DPO, %d of SFT dropped",
            *(rows.sft, rows.dpo, rows.common, rows.dpo - rows.common, rows.sft - rows.common),
        )


def _plan_weights(sft: Location, steps: Sequence[Location], settings: PairSettings, allow_pickle: bool) -> PairPlan:
    kinds = {is_adapter(one.path) for one in steps}
    if len(kinds) > 1:
        raise InputError("some of the checkpoints are adapters and others are not: give those of one kind")
    for one in steps:
        if is_adapter(sft.path) or is_adapter(one.path):
            require_base(sft, one)
    base = read_source(sft, allow_pickle)
    if kinds == {True}:
        return plan_adapters(base, [one.path for one in steps], settings)
    pair = plan_trajectory(base, [read_source(one, allow_pickle) for one in steps], settings)
    check_pair(sft, steps[-1], pair.sft, pair.dpo)
    check_steps(steps, [*(one for one in pair.earlier if isinstance(one, Checkpoint)), pair.dpo])
    return pair


@dataclass(frozen=True)
class ThetaPlan:
    """One θ(α), decided, for an engine."""

    config: ThetaConfig
    """The settings, with the models resolved to folders."""
    sft: Location
    dpo: Location
    pair: PairPlan
    earlier: tuple[Location, ...] = ()
    """The checkpoints of a training run but the last, which is `dpo`."""

    @property
    def name(self) -> str:
        """The name of θ(α), as its folder would be named."""
        return theta_name(self.dpo.name, self.config.alpha, self.config.last_step)

    def at(self, alpha: float) -> ThetaPlan:
        """Another θ(α) of the pair, of which no tensor has an α of its own; nothing is read."""
        return replace(self, config=replace(self.config, alpha=alpha), pair=self.pair.at(alpha))

    def weights(self, config: ThetaConfig | None = None) -> Row:
        """What decides the values of θ(α), or of another one of the pair: settings, and the state of both models."""
        sources = source_fingerprints(self.config, self.sft, self.dpo, self.earlier)
        return {"settings": asdict(config or self.config), **sources}

    @property
    def side_files(self) -> dict[str, Path]:
        """Config, tokenizer, template and code that go with θ(α): name → file."""
        return output_side_files(self.sft.path, self.dpo.path)


def plan_theta(config: ThetaConfig) -> ThetaPlan:
    """Decide everything about one θ(α) from headers.

    Raises:
        InputError: The models do not exist, are damaged, or do not match.
        EnvironmentFailure: The hub cannot be reached.
    """
    sft, dpo = find_pair(config)
    earlier = find_earlier(config, allow_pickle=config.allow_pickle)
    settings = pair_settings(config, (config.alpha,))
    pair = plan_located(sft, dpo, settings, allow_pickle=config.allow_pickle, earlier=earlier)
    steps = [step for step, _ in config.course]
    found = tuple(f"{step!r}={one.path}" for step, one in zip(steps, (*earlier, dpo), strict=bool(steps)))
    return ThetaPlan(replace(config, sft=str(sft.path), dpo=str(dpo.path), checkpoint=found), sft, dpo, pair, earlier)


def source_fingerprints(config: CourseConfig, sft: Location, dpo: Location, earlier: Sequence[Location]) -> Row:
    """What the weights of a pair, or of a training run, are now."""
    steps = [step for step, _ in config.course]
    course = [
        {"step": step, **source_fingerprint(one)} for step, one in zip(steps, (*earlier, dpo), strict=bool(steps))
    ]
    several = {"course": course} if earlier else {}  # with one checkpoint, it is a pair
    return {"sft": source_fingerprint(sft), "dpo": source_fingerprint(dpo), **several}
