"""Reading a Hugging Face config.json field by field, with types checked and nothing left over.

Knows no family: a reader remembers which fields were asked for, and `finish` refuses the rest.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn, TypeVar

LARGEST = 2**31 - 1
LARGEST_FLOAT = 1e30  # beyond it float32 arithmetic overflows
Choice = TypeVar("Choice")


class Bound(NamedTuple):
    """A lower limit of a number, itself allowed or not."""

    limit: float
    inclusive: bool

    def holds(self, value: float) -> bool:
        """Whether the value keeps the limit."""
        return value >= self.limit if self.inclusive else value > self.limit

    def __str__(self) -> str:
        return f"{'of at least' if self.inclusive else 'above'} {self.limit:g}"


POSITIVE = Bound(0, inclusive=False)
NOT_NEGATIVE = Bound(0, inclusive=True)
AT_LEAST_ONE = Bound(1, inclusive=True)
ABOVE_ONE = Bound(1, inclusive=False)


class FieldReader:
    """The fields of one JSON object, read by name and by type.

    Every method that reads raises ValueError with the field, what it got and what it expects. A
    field that is absent takes the default; null counts as absent only in the `optional_` methods.
    """

    def __init__(self, raw: Mapping[str, object], where: str):
        """Reads from `raw`; `where` opens every error, for instance "config.json of mixtral: "."""
        self._raw = raw
        self._where = where
        self._seen: set[str] = set()

    def inner(self, name: str, value: object) -> "FieldReader":
        """A reader of the object inside a field; its errors say `name.field`."""
        if not isinstance(value, Mapping):
            self.refuse(name, value, "an object")
        return FieldReader(value, f"{self._where}{name}.")

    def has(self, name: str) -> bool:
        """Whether the field is there, be it null."""
        return name in self._raw

    def take(self, name: str) -> object:
        """The raw value, None if absent; counts as read."""
        self._seen.add(name)
        return self._raw.get(name)

    def size(
        self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = LARGEST
    ) -> int:
        """A whole number; without a default the field is required."""
        value = self.take(name)
        expected = f"a whole number from {minimum} to {maximum}"
        if name not in self._raw:
            return self.missing(name, expected) if default is None else default
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            self.refuse(name, value, expected)
        return value

    def optional_size(self, name: str, *, minimum: int = 1) -> int | None:
        """A whole number, or None if null or absent."""
        return None if self.take(name) is None else self.size(name, minimum=minimum)

    def number(self, name: str, default: float | None = None, *, bound: Bound) -> float:
        """A finite number within the bound; without a default the field is required."""
        value = self.take(name)
        if name not in self._raw:
            return self.missing(name, f"a finite number {bound}") if default is None else default
        return self._finite(name, value, bound)

    def optional_number(self, name: str, *, bound: Bound) -> float | None:
        """A finite number within the bound, or None if null or absent."""
        value = self.take(name)
        return None if value is None else self._finite(name, value, bound)

    def numbers(self, name: str, *, count: int, bound: Bound) -> tuple[float, ...]:
        """A list of `count` finite numbers within the bound."""
        expected = f"a list of {count} numbers {bound}"
        values = self._list(name, expected)
        if len(values) != count:
            self.refuse(name, f"{len(values)} values", expected)
        return tuple(self._finite(f"{name}[{i}]", v, bound) for i, v in enumerate(values))

    def optional_sizes(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers of at least 0; empty if null or absent."""
        expected = "a list of whole numbers of at least 0"
        if self.take(name) is None:
            return ()
        sizes = []
        for value in self._list(name, expected):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                self.refuse(name, self._raw[name], expected)
            sizes.append(value)
        return tuple(sizes)

    def optional_choices(
        self, name: str, choices: Mapping[str, Choice]
    ) -> tuple[Choice, ...] | None:
        """A list of names in `choices`, as what they stand for; None if null or absent."""
        expected = f"a list of {' or '.join(map(repr, sorted(choices)))}"
        if self.take(name) is None:
            return None
        chosen = []
        for value in self._list(name, expected):
            if not isinstance(value, str) or value not in choices:
                self.refuse(name, value, expected)
            chosen.append(choices[value])
        return tuple(chosen)

    def choice(self, name: str, default: str, choices: Mapping[str, Choice]) -> Choice:
        """One of the names in `choices`; returns what it stands for."""
        taken = self.take(name)
        value = taken if name in self._raw else default
        if not isinstance(value, str) or value not in choices:
            self.refuse(name, value, f"one of {', '.join(sorted(choices))}")
        return choices[value]

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.take(name)
        if name not in self._raw:
            return default
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false")
        return value

    def only(self, name: str, allowed: object, reason: str) -> None:
        """Refuses any value but `allowed`, null and absent."""
        value = self.take(name)
        # 1 == True in Python, but not in JSON.
        if value is not None and (
            value != allowed or isinstance(value, bool) != isinstance(allowed, bool)
        ):
            self.refuse(name, value, f"{allowed!r} or absent: {reason}")

    def agree(self, names: Sequence[str]) -> None:
        """Refuses two spellings of one setting that have different values."""
        given = {name: self.take(name) for name in names if self.take(name) is not None}
        values = list(given.values())
        if any(value != values[0] for value in values):
            pairs = " and ".join(f"{name} = {value!r}" for name, value in given.items())
            raise ValueError(f"{self._where}{pairs} are spellings of one setting and must agree")

    def finish(self, irrelevant: frozenset[str] = frozenset()) -> None:
        """Refuses every field that nobody read, unless null or listed as irrelevant."""
        for name, value in self._raw.items():
            if value is not None and name not in self._seen and name not in irrelevant:
                raise ValueError(
                    f"{self._where}{name} = {value!r} is not a field this family knows, and it may "
                    "change the mathematics; remove it from config.json if it does not"
                )

    def missing(self, name: str, expected: str) -> NoReturn:
        """Raises the error of a required field that is absent."""
        raise ValueError(f"{self._where}{name} is missing; it must be {expected}")

    def refuse(self, name: str, value: object, expected: str) -> NoReturn:
        """Raises the error of a field that has a value it must not have."""
        raise ValueError(f"{self._where}{name} must be {expected}; got {value!r}")

    def _list(self, name: str, expected: str) -> Sequence[object]:
        value = self.take(name)
        if isinstance(value, str) or not isinstance(value, Sequence):
            self.refuse(name, value, expected)
        return value

    def _finite(self, name: str, value: object, bound: Bound) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # The comparison also refuses NaN, infinity and integers that no float can hold.
        if not is_number or not abs(value) < LARGEST_FLOAT or not bound.holds(float(value)):
            self.refuse(name, value, f"a finite number {bound}")
        return float(value)
