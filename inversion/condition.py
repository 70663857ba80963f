"""What the network is conditioned on: prompts and guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Condition"]

Rows = Tensor | list[Tensor]


@dataclass(frozen=True, eq=False)
class Condition:
    """Encoded prompts, with the options of guidance.

    `rows` holds one row per picture: tensors (B, …), or lists of B tensors of different lengths. `options`, such as the
    scale of guidance, hold for all rows. Indexing selects rows.
    """

    rows: Mapping[str, Rows]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def __getitem__(self, index: Tensor | slice) -> Condition:
        numbers = torch.arange(len(self))[index.cpu() if isinstance(index, Tensor) else index].tolist()
        if numbers == list(range(len(self))):  # the usual case in a walk, where embeddings may be large
            return self
        return replace(self, rows={name: _select(values, numbers) for name, values in self.rows.items()})

    def expand(self, number: int) -> Condition:
        """`number` copies of the only row."""
        return self[torch.zeros(number, dtype=torch.long)]


def _select(values: Rows, numbers: list[int]) -> Rows:
    if isinstance(values, list):
        return [values[i] for i in numbers]
    return values[torch.tensor(numbers, device=values.device, dtype=torch.long)]
