"""The findings about a training run: how straight each module's way over the steps is, as text, data and a picture.

Nothing here reads a file; `verbs/inspect.py` measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expo.checkpoint.places import Place
from expo.config.course import plain, shown_step
from expo.output.charts import COLOURS, LINE, style
from expo.theta.pair_checks import is_straight, told_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from expo.theta.trajectory.fit import Fit, Quality

DRAWN = len(COLOURS) - 1
"""Modules that have a colour of their own in the picture: those that change most."""


@dataclass(frozen=True)
class Followed:
    """One tensor and its line."""

    name: str
    place: Place
    fit: Fit


@dataclass(frozen=True)
class Way:
    """Some tensors together, on their way over the steps."""

    name: str
    tensors: int
    quality: Quality
    reached: tuple[float, ...]
    """Where they are at each step on the line from θ_0 (0) to the last step (1), as far as they lie on it."""
    fitted: tuple[float, float]
    """Slope, per step, and intercept of the line through these."""
    share: float
    """Σ_t ‖Δ_t‖² of these, of that of all tensors."""

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "module": self.name,
            "tensors": self.tensors,
            **self.quality.describe(),
            "share_of_changes": self.share,
            "reached": list(self.reached),
        }


@dataclass(frozen=True)
class Trajectory:
    """All findings about a training run."""

    rule: str
    steps: tuple[float, ...]
    tensors: tuple[Followed, ...]

    @property
    def total(self) -> Way:
        """All tensors together."""
        return self._way("total", self.tensors)

    @property
    def modules(self) -> tuple[Way, ...]:
        """The modules of the layers, then those outside them, each in the order of their names."""
        found: dict[tuple[bool, str], list[Followed]] = {}
        for one in self.tensors:
            found.setdefault((one.place.layer is None, one.place.module), []).append(one)
        return tuple(self._way(name, of_module) for (_, name), of_module in sorted(found.items()))

    def _way(self, name: str, tensors: Sequence[Followed]) -> Way:
        from expo.theta.trajectory.fit import quality

        fits = [one.fit for one in tensors]
        last = sum(fit.coefficients[-1] ** 2 for fit in fits)
        every = sum(one.fit.energy for one in self.tensors)

        def along(values: Iterable[float]) -> float:
            """Of a value per tensor in its direction, the part along the change at the last step; that is 1."""
            return sum(x * fit.coefficients[-1] for x, fit in zip(values, fits, strict=True)) / last if last else 0.0

        return Way(
            name,
            len(fits),
            quality(fits),
            tuple(along(fit.coefficients[at] for fit in fits) for at in range(len(self.steps))),
            (along(fit.slope for fit in fits), along(fit.intercept for fit in fits)),
            sum(fit.energy for fit in fits) / every if every else 0.0,
        )

    @property
    def is_straight(self) -> bool:
        """Whether it moves along straight lines, as far as its checkpoints show."""
        return is_straight(self.total.quality)

    @property
    def verdict(self) -> str:
        """The same as a sentence."""
        return told_lines(self.total.quality, len(self.steps))

    def describe(self) -> dict[str, Any]:
        """Everything as plain data."""
        from expo.theta.trajectory.fit import describe

        total = self.total.describe()
        return {
            "rule": self.rule,
            "steps": [*map(plain, self.steps)],
            "straight": self.is_straight,
            "verdict": self.verdict,
            **{name: total[name] for name in ("explained_variance", "r2", "reached")},
            "modules": [one.describe() for one in self.modules],
            "tensors": describe({one.name: one.fit for one in self.tensors})["tensors"],
        }

    def rows(self) -> list[tuple[str, ...]]:
        """A table with a row per module: how well its line fits, and where it is at each step."""
        heads = ("module", "explained", "R²", *(f"step {shown_step(step)}" for step in self.steps), "tensors")
        return [heads, *map(_row, (*self.modules, self.total))]


def _row(way: Way) -> tuple[str, ...]:
    fit = (_number(way.quality.explained), _number(way.quality.r2))
    return (way.name, *fit, *map(_number, way.reached), str(way.tensors))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def picture(found: Trajectory, title: str) -> Figure:
    """Draw where each module is at each step, and the line through all of them.

    Returns:
        A figure, to be saved in `charts.style`.
    """
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.add_subplot()
        total, last = found.total, found.steps[-1]
        steps = (0.0, *found.steps)
        largest = sorted(found.modules, key=lambda way: -way.share)
        for number, way in reversed(list(enumerate(largest))):
            named = number < DRAWN
            colour, label = (COLOURS[1 + number], _label(way)) if named else (LINE, None)
            axes.plot(steps, (0.0, *way.reached), color=colour, label=label, marker="o", markersize=4, linewidth=1.4)
        slope, intercept = total.fitted
        axes.plot(
            (0, last),
            (intercept, slope * last + intercept),
            color=COLOURS[0],
            linestyle="--",
            label=f"line, {_label(total)}",
        )
        axes.set_xlabel("training step")
        axes.set_ylabel("place on the line from θ_0 to the last step")
        axes.set_title(title, loc="left", fontsize=10, parse_math=False)
        handles, labels = axes.get_legend_handles_labels()
        legend = figure.legend(handles[::-1], labels[::-1], loc="outside right upper", title="explained variance, R²")
        legend.set_alignment("left")
    return figure


def _label(way: Way) -> str:
    return f"{way.name}: {_number(way.quality.explained)}, R² {_number(way.quality.r2)}"
