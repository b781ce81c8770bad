"""Reads typed fields of a JSON object; what is wrong becomes a 400 that names the field. null means absent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from amem.server.errors import ApiError, bad_request
from amem.server.strict_json import Json, kind_of

T = TypeVar("T")


class Fields:
    """One JSON object. `path` is where it stands in the body, for messages."""

    def __init__(self, data: Json, path: str = "") -> None:
        self._data = data
        self._path = path

    @classmethod
    def of(cls, value: Any, path: str) -> Fields:
        """`value` as an object. Raises ApiError 400 when it is something else."""
        if not isinstance(value, dict):
            raise bad_request(f"{path} must be an object, not {kind_of(value)}.", path, "invalid_type")
        return cls(value, path)

    def name(self, field: str) -> str:
        return f"{self._path}.{field}" if self._path else field

    def get(self, field: str) -> Any:
        return self._data.get(field)

    def only(self, known: Iterable[str]) -> None:
        """Raises ApiError 400 for a field that is not in `known`."""
        unknown = sorted(set(self._data) - set(known))
        if unknown:
            param = self.name(unknown[0][:64])
            raise bad_request(f"Unknown field: {param}.", param, "unknown_parameter")

    def text(self, field: str, longest: int | None = None, blank: bool = False) -> str | None:
        value: str | None = self._typed(field, lambda v: isinstance(v, str), "a string")
        if value is None:
            return None
        if not blank and not value.strip():
            raise bad_request(f"{self.name(field)} is empty.", self.name(field), "empty_value")
        if longest is not None and len(value) > longest:
            message = f"{self.name(field)} has {len(value)} characters; at most {longest} are allowed."
            raise bad_request(message, self.name(field), "value_too_long")
        return value

    def needed_text(self, field: str, longest: int | None = None) -> str:
        return self.needed(field, self.text(field, longest))

    def flag(self, field: str, default: bool = False) -> bool:
        value: bool | None = self._typed(field, lambda v: isinstance(v, bool), "a boolean")
        return default if value is None else value

    def integer(self, field: str, low: int, high: int) -> int | None:
        value: int | None = self._typed(field, lambda v: type(v) is int, "an integer")
        self._check_range(field, value, low, high)
        return value

    def number(self, field: str, low: float, high: float) -> float | None:
        value: float | None = self._typed(field, lambda v: type(v) in (int, float), "a number")
        self._check_range(field, value, low, high)
        return None if value is None else float(value)

    def choice(self, field: str, choices: Iterable[str]) -> str | None:
        value = self.text(field)
        names = tuple(choices)
        if value is not None and value not in names:
            message = f"{self.name(field)} must be one of {', '.join(names)}."
            raise bad_request(message, self.name(field))
        return value

    def object(self, field: str) -> Fields | None:
        value = self.get(field)
        return None if value is None else Fields.of(value, self.name(field))

    def mapping(self, field: str) -> Mapping[str, Any] | None:
        value: Json | None = self._typed(field, lambda v: isinstance(v, dict), "an object")
        return value

    def array(self, field: str) -> list[Any] | None:
        value: list[Any] | None = self._typed(field, lambda v: isinstance(v, list), "an array")
        return value

    def needed(self, field: str, value: T | None) -> T:
        if value is None:
            raise self.missing(field)
        return value

    def missing(self, field: str) -> ApiError:
        return bad_request(f"{self.name(field)} is required.", self.name(field), "missing_required_parameter")

    def _typed(self, field: str, fits: Callable[[Any], bool], wanted: str) -> Any:
        value = self.get(field)
        if value is not None and not fits(value):
            message = f"{self.name(field)} must be {wanted}, not {kind_of(value)}."
            raise bad_request(message, self.name(field), "invalid_type")
        return value

    def _check_range(self, field: str, value: float | None, low: float, high: float) -> None:
        if value is not None and not low <= value <= high:
            message = f"{self.name(field)} must be between {low} and {high}."
            raise bad_request(message, self.name(field), "value_out_of_range")


def merged(top: T | None, inner: T | None, name: str) -> T | None:
    """A field that may stand at the top level or inside `amem`. Raises ApiError 400 when the two differ."""
    if top is not None and inner is not None and top != inner:
        raise bad_request(f"{name} and amem.{name} differ; send one of them.", name, "conflicting_values")
    return inner if top is None else top
