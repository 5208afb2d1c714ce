"""Which of two models was made from the other, as far as their own files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import write_checkpoint
from huggingface_hub import metadata_load
from yaml import YAMLError

from expo.checkpoint.folder import Location, read_card, read_checkpoint
from expo.errors import InputError
from expo.theta.pair_checks import check_change, check_pair


def card(base: str) -> dict[str, str]:
    return {"README.md": f"---\nbase_model: {base}\n---\nwords\n"}


def config(base: object) -> dict[str, str]:
    return {"config.json": json.dumps({"_name_or_path": base})}


PAIRS: dict[str, tuple[dict[str, str], dict[str, str], bool]] = {
    "nothing is said": ({}, {}, False),
    "DPO's card names SFT": ({}, card("org/sft"), False),
    "SFT's card names DPO": (card("org/dpo"), {}, True),
    "SFT's card names DPO among others": (card("[x/y, org/dpo]"), {}, True),
    "SFT's config names DPO": (config("org/dpo"), {}, True),
    "SFT's config names DPO's folder": (config("/models/dpo/"), {}, True),
    "each names the other": (card("org/dpo"), card("org/sft"), False),
    "SFT names its own base": (card("org/base"), card("org/sft"), False),
    "SFT names itself": (config("org/sft"), {}, False),
    "a name that only contains DPO's": (card("org/dpo-2"), {}, False),
    "nonsense": ({**card("{a: [1, null]}"), **config(7)}, card("[[]]"), False),
}


@pytest.mark.parametrize("case", PAIRS)
def test_a_swapped_pair_is_a_warning(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    sft_files, dpo_files, swapped = PAIRS[case]
    locations, weights = [], []
    for name, files in (("sft", sft_files), ("dpo", dpo_files)):
        folder = write_checkpoint(tmp_path / f"snapshot-{name}", {"w": torch.ones(2)}, files=files)
        locations.append(Location(folder, name, f"org/{name}", "0" * 40))
        weights.append(read_checkpoint(folder))
    check_pair(*locations, *weights)
    expected = ["org/sft says it was trained from org/dpo: are --sft and --dpo swapped?"]
    assert caplog.messages == (expected if swapped else [])


CARDS = (
    "---\na: 1\n---\n",
    "---\na: 1\n---",
    "\n \n---\na: [x, {y: 2}]\nb: é\n---  \n# words\n---\nc: 2\n---\n",
    "\ufeff---\r\na: 1\r\n---\r\nwords\r\n",
    "---\n\n---\n",
    "---\na: 1\n--- no end\n",
    "---\na: 1\n ---\n",
    "words\n---\na: 1\n---\n",
    "---\n- a\n- b\n---\n",
    "---\na: [\n---\n",
    "---\na: !!python/object/apply:os.system [ls]\n---\n",
    "----\na: 1\n---\n",
    "",
)


@pytest.mark.parametrize("text", CARDS)
def test_a_card_says_what_the_hubs_library_reads_in_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    try:
        wanted = metadata_load(tmp_path / "README.md") or {}
    except (ValueError, YAMLError):
        wanted = {}
    assert read_card(tmp_path) == wanted


def test_two_folders_of_one_name_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = [
        write_checkpoint(tmp_path / side / "model", {"w": torch.ones(2)}, files=config("model")) for side in "ab"
    ]
    check_pair(*(Location(folder, "model") for folder in folders), *map(read_checkpoint, folders))
    assert caplog.messages == []


def test_a_shard_linked_into_both_folders_is_no_twin_of_all(tmp_path: Path) -> None:
    """Only all weights being the same files is refused: a shard of frozen layers may be shared."""
    tensors = {"a": torch.ones(2), "b": torch.ones(2)}
    sft, dpo = (write_checkpoint(tmp_path / name, tensors, shards=2) for name in ("sft", "dpo"))
    shared, other = sorted(sft.glob("*.safetensors"))
    for file in (shared, other):
        (dpo / file.name).unlink()
        (dpo / file.name).hardlink_to(file)
        pair = Location(sft, "sft"), Location(dpo, "dpo"), read_checkpoint(sft), read_checkpoint(dpo)
        if file == shared:
            check_pair(*pair)
    with pytest.raises(InputError, match="are the same files"):
        check_pair(*pair)


@pytest.mark.parametrize(("relative", "warned"), [(0.036, False), (0.29, False), (0.99, True), (None, False)])
def test_a_large_change_is_a_warning(relative: float | None, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    check_change(relative, relative)
    assert ["is 0.99 of ‖θ_sft‖" in message for message in caplog.messages] == [True] * warned


def test_no_change_is_refused() -> None:
    with pytest.raises(InputError, match="have the same weights"):
        check_change(0.0, 0.0)
