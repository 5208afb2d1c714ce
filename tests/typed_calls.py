"""Calls of the package's functions as users write them: `mypy` reads them, and nothing runs them.

An ignored error that is none is an error to mypy: what is wrong here has to be found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import expo
from expo.verbs.extrapolate import Extrapolated

made = expo.extrapolate(sft="s", dpo=Path("d"), alpha=0.3, output=Path("o"))
assert_type(made, Extrapolated)
assert_type(made.path, Path)
assert_type(expo.extrapolate(sft="s", dpo="d", alpha=[0.1, 0.2], dry_run=True), dict[str, Any])
assert_type(expo.generate("alpaca", model=made).rows, int)
assert_type(expo.score("alpaca", name="m").mean, float | None)
assert_type(expo.compare("a", made, task="alpaca").text, str)
assert_type(expo.sweep(sft="s", dpo="d", search="race").best_alpha, float)

expo.generate("alpaca", model="m", limit="ten")  # type: ignore[call-overload]
expo.sweep(sft="s", dpo="d", search="gird")  # type: ignore[call-overload]
expo.score("alpaca", nmae="m")  # type: ignore[call-overload]
expo.extrapolate("s", "d")  # type: ignore[call-overload]
