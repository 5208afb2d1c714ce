"""A pair of checkpoints, found, checked and planned: the first step of everything that computes θ(α).

`extrapolate.py` writes the plan's tensors as files; `tensors.py` gives them to an engine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from expo.checkpoint.folder import Location, find_folder, is_adapter, source_fingerprint
from expo.checkpoint.hub import locate
from expo.checkpoint.pickled import read_source
from expo.checkpoint.remote import locate_remote
from expo.checkpoint.tokens import require_same_tokens
from expo.config import Dtype, ExtrapolateConfig, PairConfig, ThetaConfig
from expo.errors import InputError
from expo.files import Row
from expo.theta.adapter.folders import output_side_files, require_base
from expo.theta.decide import plan_pair
from expo.theta.decide_adapter import plan_adapter
from expo.theta.names import theta_name
from expo.theta.pair_checks import check_pair
from expo.theta.plan import PairPlan, PairSettings
from expo.theta.rules import require_rule

log = logging.getLogger(__name__)


def find_pair(config: ThetaConfig | ExtrapolateConfig) -> tuple[Location, Location]:
    """Find both models, fetching what is needed.

    Raises:
        InputError: One of them does not exist, or no rule has that name.
        EnvironmentFailure: The hub cannot be reached.
    """
    require_rule(config.rule)  # before anything is fetched
    if isinstance(config, ExtrapolateConfig) and config.stream_sft:
        return _find_streamed(config)
    sft = find_folder(config.sft) or locate(config.sft, weights_only=True, pickled=config.allow_pickle)
    dpo = find_folder(config.dpo) or locate(config.dpo, pickled=config.allow_pickle)
    if is_adapter(dpo.path):  # then SFT's config and other side files are θ(α)'s
        sft = find_folder(config.sft) or locate(config.sft, pickled=config.allow_pickle)
    return sft, dpo


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
    return PairSettings(
        alphas=tuple(alphas),
        rule=config.rule,
        alpha_for=config.alphas_for,
        exclude=config.exclude,
        copy_missing=config.missing == "copy-dpo",
        common_vocabulary=config.vocab == "common",
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        allow_nonfinite=config.allow_nonfinite,
    )


def plan_located(sft: Location, dpo: Location, settings: PairSettings, *, allow_pickle: bool) -> PairPlan:
    """Decide from headers what happens to every tensor, and warn about what is dropped.

    Raises:
        InputError: The checkpoints are damaged or do not match, or nothing would be extrapolated.
    """
    pair = _plan_weights(sft, dpo, settings, allow_pickle)
    if not pair.has_change:
        raise InputError(f"no tensor would be extrapolated: every θ(α) would be a copy of {dpo.label}")
    common = pair.vocabulary.common if pair.vocabulary else 0
    require_same_tokens(sft.path, dpo.path, common, needed=pair.extrapolates_tokens)
    _say(pair, sft)
    return pair


def _say(pair: PairPlan, sft: Location) -> None:
    """Log what is not the usual pair's."""
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


def _plan_weights(sft: Location, dpo: Location, settings: PairSettings, allow_pickle: bool) -> PairPlan:
    if is_adapter(sft.path) or is_adapter(dpo.path):
        require_base(sft, dpo)
    if is_adapter(dpo.path):
        return plan_adapter(read_source(sft, allow_pickle), dpo.path, settings)
    pair = plan_pair(read_source(sft, allow_pickle), read_source(dpo, allow_pickle), settings)
    check_pair(sft, dpo, pair.sft, pair.dpo)
    return pair


@dataclass(frozen=True)
class ThetaPlan:
    """One θ(α), decided, for an engine."""

    config: ThetaConfig
    """The settings, with the models resolved to folders."""
    sft: Location
    dpo: Location
    pair: PairPlan

    @property
    def name(self) -> str:
        """The name of θ(α), as its folder would be named."""
        return theta_name(self.dpo.name, self.config.alpha)

    def weights(self) -> Row:
        """What decides the values of θ(α): the settings, and the state of both models as it is now."""
        sides = {"sft": self.sft, "dpo": self.dpo}
        return {"settings": asdict(self.config), **{side: source_fingerprint(one) for side, one in sides.items()}}

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
    pair = plan_located(sft, dpo, pair_settings(config, (config.alpha,)), allow_pickle=config.allow_pickle)
    return ThetaPlan(replace(config, sft=str(sft.path), dpo=str(dpo.path)), sft, dpo, pair)
