"""Settings of a run: compared by name, and checked against a type."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

__all__ = ["differences", "flatten", "typed"]

T = TypeVar("T")

MAX_CHARACTERS = 60  # of a value that is shown
UNSET = "not set"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, ignore: Collection[str] = ()) -> list[str]:
    """Each setting in which the two differ, by name: ["steps was 50, is 20", "model name was not set, is pocket"].

    Values are compared as JSON gives them back, so a tuple equals a list. Nested settings are compared one by one and
    named by all their names. `ignore` holds names, nested ones as "model name", that may differ.
    """
    before, now = flatten(old), flatten(new)
    names = [name for name in {**before, **now} if name not in ignore]
    return [
        f"{name} was {_brief(before, name)}, is {_brief(now, name)}"
        for name in names
        if name not in before or name not in now or before[name] != now[name]
    ]


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"model": {"name": "pocket"}} → {"model name": "pocket"}, with values as JSON gives them back."""
    return _flat(json.loads(json.dumps(dict(settings))), "")


def _flat(settings: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _brief(settings: dict[str, Any], name: str) -> str:
    if name not in settings:
        return UNSET
    value = settings[name]
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 3] + "..."


def typed(kind: type[T], value: object) -> T:
    """`value`, a dict from JSON, as the dataclass `kind`, whose fields must be there and of exactly their types.

    What JSON gives is meant: a list is no tuple, True no int, "1" no int. Unknown names are ignored. Raises ValueError
    with one line that names the first field that does not fit.
    """
    from pydantic import ValidationError

    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    try:
        checked = _strict(kind)(**{str(name): item for name, item in value.items()})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise ValueError(f"{' '.join(map(str, first['loc']))}: {first['msg']}") from None
    return kind(**{field.name: getattr(checked, field.name) for field in fields(checked)})


@cache
def _strict(kind: type) -> Any:
    from pydantic import ConfigDict
    from pydantic.dataclasses import dataclass

    frozen = kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return dataclass(kind, frozen=frozen, config=ConfigDict(strict=True, extra="ignore"))
