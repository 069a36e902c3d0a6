"""The search space of a sweep: the settings that vary and their values, in YAML, drawn from or enumerated.

=========================  ==========================================================
in the sweep's file        meaning
=========================  ==========================================================
``[0, 1, inf]``            one of these values (also ``{choice: [0, 1, inf]}``)
``{uniform: [a, b]}``      a number between a and b
``{loguniform: [a, b]}``   a number between a and b, evenly in its logarithm
``{integers: [a, b]}``     a whole number from a to b, both included
=========================  ==========================================================

The key ``variant`` is none of a run. It names groups of settings that vary together, ``{label: {key: value}}``; the key
``config`` in a group names the description that its trials start from.
"""

import itertools
import math
import random
import re
from dataclasses import dataclass
from typing import Any

VARIANT = "variant"
"""Key of the space whose values are the labels of groups of settings."""
KINDS = ("choice", "uniform", "loguniform", "integers")
MAX_TRIALS = 1000
"""More than this is no sweep but a typing error."""

_ENUMERATED = 100_000  # spaces up to this size are shuffled; in larger ones, draws that meet are drawn again
_BETWEEN = 0.381966  # of a range, where no whole number lies by chance
_MISSES = 1000  # draws in a row that meet known settings, after which the space counts as exhausted


@dataclass(frozen=True)
class Dimension:
    """One setting that varies.

    Args:
        key: of the run's description, such as ``reward.attenuation``.
        kind: one of ``KINDS``.
        values: the values to choose from, or the lower and the upper end.
    """

    key: str
    kind: str
    values: tuple[Any, ...]

    @property
    def count(self) -> int | None:
        """How many values it has; None for a continuous range."""
        if self.kind == "choice":
            return len(self.values)
        return int(self.values[1] - self.values[0]) + 1 if self.kind == "integers" else None

    @property
    def listed(self) -> list[Any]:
        """All values of a range that is not continuous, in order."""
        low, high = self.values[0], self.values[-1]
        return list(self.values) if self.kind == "choice" else list(range(low, high + 1))

    @property
    def probes(self) -> list[Any]:
        """Values that show whether a run may have it: all of a choice, of a range both ends and one between them."""
        if self.count is not None:
            return list(self.values)
        low, high = self.values
        return [low, high, low + (high - low) * _BETWEEN]

    def draw(self, generator: random.Random) -> Any:
        """Draws a value; a continuous one is rounded to four digits, or to four of a narrow range's width."""
        if self.count is not None:
            return generator.choice(self.listed) if self.kind == "choice" else generator.randint(*self.values)
        low, high = self.values
        if self.kind == "loguniform":
            value = math.exp(generator.uniform(math.log(low), math.log(high)))
        else:
            value = generator.uniform(low, high)
        width = min(value, high - low) if self.kind == "loguniform" else high - low
        return min(high, max(low, round(value, 3 - math.floor(math.log10(width)))))

    def own(self, value: Any) -> Any:
        """Returns the value as it stands in the space.

        Raises:
            ValueError: it does not.
        """
        value, inside = _number(value), False
        if self.kind == "choice":
            same = [each for each in self.values if each == value]
            value, inside = (same or [value])[0], bool(same)
        elif _finite(value) and (self.kind != "integers" or isinstance(value, int)):
            inside = self.values[0] <= value <= self.values[1]
        if not inside:
            allowed = list(self.values) if self.kind == "choice" else {self.kind: list(self.values)}
            raise ValueError(f"first: {self.key} = {value!r} is not in the space; allowed: {allowed}")
        return value


def parse_space(space: dict[str, Any]) -> list[Dimension]:
    """Reads the ``space`` of a sweep's file.

    Raises:
        ValueError: in one line: no setting varies, a range is empty, or what is written is none of the forms above.
    """
    if not space:
        raise ValueError("space is empty; name a setting that varies, such as reward.attenuation: [0, 1, 2]")
    return [_dimension(str(key), given) for key, given in space.items()]


def _dimension(key: str, given: Any) -> Dimension:
    if key == VARIANT:
        return _variants(given)
    kind, values = ("choice", given) if isinstance(given, list) else _kind(key, given)
    if not isinstance(values, list):
        raise ValueError(f"space.{key}: {kind} = {values!r}; expected a list")
    values = [_number(value) for value in values]
    if kind == "choice":
        if not values:
            raise ValueError(f"space.{key} = []: the range is empty; give one value or more")
        if twice := [value for place, value in enumerate(values) if value in values[:place]]:
            raise ValueError(f"space.{key}: {twice[0]!r} stands in the list twice; give each value once")
        return Dimension(key, kind, tuple(values))
    wanted = int if kind == "integers" else (int, float)
    if len(values) != 2 or not all(_finite(value) and isinstance(value, wanted) for value in values):
        what = "whole numbers" if kind == "integers" else "finite numbers"
        raise ValueError(f"space.{key}: {kind} = {values!r}; expected two {what}, the lower and the upper end")
    low, high = values
    if low >= high:
        raise ValueError(f"space.{key}: {kind} = {values!r} is empty; the lower end must be below the upper one")
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"space.{key}: loguniform = {values!r}; both ends must be above 0")
    return Dimension(key, kind, (low, high))


def _variants(given: Any) -> Dimension:
    if not isinstance(given, dict) or not given or not all(isinstance(each, dict) for each in given.values()):
        raise ValueError(
            f"space.{VARIANT} = {given!r}; expected labels with settings, such as "
            "{base: {}, short: {method.tau: 0.4}}"
        )
    for label in given:
        if not isinstance(label, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", label):
            raise ValueError(
                f"space.{VARIANT}: label {label!r}; runs are named by it: allowed are letters, digits, dot, dash and "
                "underscore, a letter or digit first, at most 80"
            )
    return Dimension(VARIANT, "choice", tuple(given))


def _kind(key: str, given: Any) -> tuple[str, Any]:
    if not isinstance(given, dict) or len(given) != 1 or next(iter(given)) not in KINDS:
        raise ValueError(
            f"space.{key} = {given!r}; allowed: a list of values, or one of "
            f"{', '.join(f'{{{kind}: [...]}}' for kind in KINDS)}; nested keys are written with dots"
        )
    return next(iter(given.items()))


def _number(value: Any) -> Any:
    """Returns the number that a text is: YAML has 1.0e-4 and .inf, people write 1e-4 and inf."""
    try:
        return float(value) if isinstance(value, str) and value != "nan" else value
    except ValueError:
        return value


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def size(dimensions: list[Dimension]) -> int | None:
    """Counts the different settings of a space; None if a range is continuous."""
    counts = [dimension.count for dimension in dimensions]
    return None if None in counts else math.prod(count or 1 for count in counts)


def grid(dimensions: list[Dimension], trials: int | None) -> list[dict[str, Any]]:
    """Returns all combinations, the last setting varying fastest.

    Raises:
        ValueError: a range is continuous, or there are more combinations than ``trials`` or than ``MAX_TRIALS``.
    """
    for dimension in dimensions:
        if dimension.count is None:
            raise ValueError(
                f"space.{dimension.key}: a grid needs a list of values, and {dimension.kind} is a range; write the "
                "values out, or set algorithm=random"
            )
    count, most = size(dimensions) or 0, min(trials or MAX_TRIALS, MAX_TRIALS)
    if count > most:
        sizes = " x ".join(str(dimension.count) for dimension in dimensions)
        raise ValueError(
            f"the grid has {count} combinations ({sizes}), more than {'trials = ' if trials else ''}{most}; leave "
            "values out, raise trials, or set algorithm=random"
        )
    return _combinations(dimensions)


def _combinations(dimensions: list[Dimension]) -> list[dict[str, Any]]:
    """Returns all settings of a space without continuous ranges, the last key varying fastest."""
    rows = itertools.product(*(dimension.listed for dimension in dimensions))
    return [dict(zip([dimension.key for dimension in dimensions], row, strict=True)) for row in rows]


def draw(dimensions: list[Dimension], first: list[dict[str, Any]], trials: int, seed: int) -> list[dict[str, Any]]:
    """``trials`` different settings: those of ``first``, then random ones; with more trials the same ones come first.

    Raises:
        ValueError: the space has fewer different settings than that, or ``first`` has one that is not in the space, or
            one twice.
    """
    total = size(dimensions)
    if total is not None and trials > total:
        raise ValueError(
            f"trials = {trials} exceeds the {total} different settings of the space; allowed: 1 to {total} "
            "(or algorithm=grid for all of them)"
        )
    generator = random.Random(seed)
    found = [{dimension.key: dimension.own(one[dimension.key]) for dimension in dimensions} for one in first]
    if twice := [one for place, one in enumerate(found) if one in found[:place]]:
        raise ValueError(f"first: {shown(twice[0])} stands there twice; give each once")
    found = found[:trials]
    if total is not None and total <= _ENUMERATED:
        rows = _combinations(dimensions)
        generator.shuffle(rows)
        return [*found, *(row for row in rows if row not in found)][:trials]
    missed, known = 0, {_key(one) for one in found}
    while len(found) < trials:
        one = {dimension.key: dimension.draw(generator) for dimension in dimensions}
        missed = 0 if _key(one) not in known else missed + 1
        known.add(_key(one))
        if missed > _MISSES:
            raise ValueError(
                f"trials = {trials}: the ranges of space have fewer different values than that; widen them, or lower "
                "trials"
            )
        found += [one] if not missed else []
    return found


def _key(settings: dict[str, Any]) -> tuple[Any, ...]:
    """Returns settings in a form that a set can hold; two are equal where the settings are."""
    return tuple(
        (key, repr(value) if isinstance(value, list | dict) else value) for key, value in sorted(settings.items())
    )


def shown(settings: dict[str, Any]) -> str:
    """Returns settings as a person reads them: ``reward.attenuation=1 reward.segments=4``."""
    return " ".join(f"{key}={label(value)}" for key, value in settings.items())


def label(value: Any) -> str:
    """Returns a value as tables and pictures show it: ``0.001``, ``inf``, ``draft``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:.4g}"
