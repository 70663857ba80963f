"""Memory: how much work takes, and how much work fits."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ringmark.errors import ModelError

__all__ = ["fitting_batch", "halving", "memory_kilobytes", "peak_during", "release_memory", "stored_bytes"]

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCH = 8  # items at a time on a CPU
MOST = 64  # and at most on a GPU


def fitting_batch(device: torch.device, one: Callable[[], object]) -> int:
    """How many items to process at a time, where `one` processes one: on a GPU, what half of its free memory holds.

    Raises ModelError as `halving` does.
    """
    if device.type != "cuda":
        return BATCH
    halving(lambda _: [one()], [None])  # libraries allocate some memory once
    _, megabytes = peak_during(device, one)
    free = torch.cuda.mem_get_info(device)[0] / 2**20
    return max(1, min(MOST, int(free / 2 / max(megabytes, 1))))


def halving(work: Callable[[list[Item]], list[Result]], items: list[Item]) -> list[Result]:
    """`work(items)`, half by half where the GPU has too little memory for all at once.

    Raises ModelError (model.memory) if it has too little for one item.
    """
    try:
        return work(items)
    except torch.OutOfMemoryError:
        if len(items) < 2:
            raise ModelError("model.memory", "the GPU has too little free memory for one image") from None
    torch.cuda.empty_cache()  # not in the handler, whose traceback holds tensors
    middle = len(items) // 2
    return halving(work, items[:middle]) + halving(work, items[middle:])


def peak_during(device: torch.device, work: Callable[[], Result]) -> tuple[Result, float]:
    """The result of `work` and its peak memory in megabytes above what was in use before.

    On a CPU this is Linux's figure for the process, and NaN on other systems; memory that a library has freed but not
    returned counts as in use.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return work(), (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to current use
        before = memory_kilobytes("VmRSS")
        memory_kilobytes("VmHWM")
    except OSError:
        return work(), float("nan")
    return work(), (memory_kilobytes("VmHWM") - before) / 2**10


def release_memory() -> None:
    """Return memory that the C library has freed to the system, if it can (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # TypeError: Windows needs a library name
        return


def memory_kilobytes(field: str) -> int:
    """A field of this process's status, such as VmRSS, in kilobytes.

    Raises OSError if the system does not provide it (outside Linux).
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    values = [int(line.split()[1]) for line in lines if line.startswith(field + ":")]
    if not values:
        raise OSError(errno.ENOENT, f"no {field} in it", "/proc/self/status")
    return values[0]


def stored_bytes(map_: Callable[[Tensor], Tensor], z: Tensor, weights: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd stores, besides the weights, to differentiate map_(z): a lower bound for a gradient.

    With weights and z on the meta device nothing is computed, so the size need not fit in memory.
    """
    known = {w.untyped_storage()._cdata for w in weights}
    stored: dict[int, torch.UntypedStorage] = {}  # keeps the storages alive, so that no address is used twice

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in known:
            stored[storage._cdata] = storage
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        _graph = map_(z.detach().requires_grad_())
    return sum(storage.nbytes() for storage in stored.values())
