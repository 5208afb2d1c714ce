"""The rows of the page, as columns of JSON, compressed; `page.js` unpacks them."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterable, Sequence

from expo.files import Row
from expo.verbs.report.aligned import Aligned

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def columns(aligned: Aligned) -> Row:
    """Everything that the browser of outputs shows.

    Returns:
        Plain data. A row's answers stand beside each other, since alike texts compress best where they are near.
    """
    asked = list(dict.fromkeys((row.prompt, row.context) for row in aligned.first))
    number_of = {one: number for number, one in enumerate(asked)}
    runs = range(len(aligned.runs))
    reasons, finish = _indexed(aligned.finish_reasons(number) for number in runs)
    subsets, (subset,) = _indexed([[row.subset or None for row in aligned.first]])
    return {
        "models": [run.name for run in aligned.runs],
        "rewardModels": list(aligned.reward_models),
        "decimals": [aligned.decimals[model] for model in aligned.reward_models],
        "unit": aligned.unit,
        "subsets": subsets,
        "reasons": reasons,
        "asked": [{"prompt": prompt, "context": [list(turn) for turn in context]} for prompt, context in asked],
        "row": {
            "asked": [number_of[row.prompt, row.context] for row in aligned.first],
            "id": [row.id for row in aligned.first],
            "sample": [key.sample for key in aligned.keys],
            "turn": [key.turn for key in aligned.keys],
            "subset": subset,
            "shared": [int(shared) for shared in aligned.shared],
        },
        "outputs": [list(texts) for texts in zip(*(aligned.outputs(number) for number in runs), strict=True)],
        "lengths": [aligned.lengths(number) for number in runs],
        "finish": finish,
        "rewards": [[aligned.rewards(model, number) for number in runs] for model in aligned.reward_models],
    }


def _indexed(columns_of_words: Iterable[Sequence[str | None]]) -> tuple[list[str], list[list[int]]]:
    """Words as numbers: the words, and each column's places among them; −1 where there is none."""
    kept = [list(column) for column in columns_of_words]
    words = list(dict.fromkeys(word for column in kept for word in column if word is not None))
    places = {word: place for place, word in enumerate(words)}
    return words, [[-1 if word is None else places[word] for word in column] for column in kept]


def packed(data: Row) -> str:
    """JSON, compressed by gzip, in base64: the same text for the same data."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = LONE_SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()
