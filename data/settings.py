"""Settings of a run: compare them by name, and check them against a type."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

__all__ = ["differences", "flatten", "typed"]

T = TypeVar("T")

MAX_CHARACTERS = 60  # longest value shown
UNSET = "not set"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, ignore: Collection[str] = ()) -> list[str]:
    """The settings that differ, by name: ["steps was 50, is 20", "model name was not set, is pocket"].

    Values are compared after a round trip through JSON, so a tuple equals a list. Nested settings are compared one by
    one, with names such as "model name". Names in `ignore` may differ.
    """
    before, now = flatten(old), flatten(new)
    names = [name for name in {**before, **now} if name not in ignore]
    return [
        f"{name} was {_brief(before, name)}, is {_brief(now, name)}"
        for name in names
        if name not in before or name not in now or before[name] != now[name]
    ]


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"model": {"name": "pocket"}} → {"model name": "pocket"}, with values after a round trip through JSON."""
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
    """`value`, a dict from JSON, as the dataclass `kind`; all fields must be present and have exactly their types.

    Types are strict: a list is not accepted as a tuple, nor True or "1" as an int. Unknown names are ignored. Raises
    ValueError with one line that names the first invalid field.
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
