"""What is counted is what was allocated; no number here depends on what a kernel takes."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from ringmark.errors import ModelError
from ringmark.inversion import memory
from ringmark.inversion.memory import (
    fitting_batch,
    halving,
    memory_kilobytes,
    peak_during,
    release_memory,
    stored_bytes,
)

CPU = torch.device("cpu")


def test_stored_bytes_are_what_the_derivatives_need():
    z, weight = torch.ones(3, 5), torch.ones(5, 7)
    assert stored_bytes(lambda x: x.exp(), z) == 3 * 5 * 4  # its result
    assert stored_bytes(lambda x: x.sin().exp(), z) == 2 * 3 * 5 * 4
    assert stored_bytes(lambda x: x + 1, z) == 0
    assert stored_bytes(lambda x: x @ weight, z, [weight]) == 0  # linear in z: the weight alone
    assert stored_bytes(lambda x: x @ weight, z) == 5 * 7 * 4


def test_stored_bytes_need_no_memory_on_the_meta_device():
    assert stored_bytes(torch.exp, torch.empty(10**6, 10**6, device="meta")) == 4 * 10**12


def written_pages(_: int) -> int:
    """Fill 64 MB that come from the system and not from what the C library holds, and give them back."""
    with mmap.mmap(-1, 2**26) as pages:
        return pages.write(b"x" * 2**26)


@pytest.mark.skipif(sys.platform != "linux", reason="by Linux's account")
def test_the_peak_of_work_is_what_it_holds_at_once():
    def work():
        return sum(map(written_pages, range(2)))  # 64 MB, twice but not at once

    total, megabytes = peak_during(CPU, work)
    assert total == 2 * 2**26
    assert megabytes > 32 or megabytes != megabytes  # NaN where the account cannot be set back
    assert memory_kilobytes("VmRSS") > 0
    with pytest.raises(OSError, match="VmNonesuch"):
        memory_kilobytes("VmNonesuch")


def holding(most):
    """Work that has memory for so many items, and the sizes of the batches that it is asked for."""
    asked = []

    def work(items):
        asked.append(len(items))
        if len(items) > most:
            raise torch.OutOfMemoryError
        return [-item for item in items]

    return work, asked


@pytest.mark.parametrize(
    ("most", "sizes"), [(9, [7]), (3, [7, 3, 4, 2, 2]), (1, [7, 3, 1, 2, 1, 1, 4, 2, 1, 1, 2, 1, 1])]
)
def test_a_batch_that_is_too_large_is_halved(most, sizes):
    work, asked = holding(most)
    assert halving(work, list(range(7))) == [-i for i in range(7)] and asked == sizes


def test_an_item_that_is_too_large_is_refused():
    with pytest.raises(ModelError) as refused:
        halving(holding(0)[0], [1, 2])
    assert refused.value.code == "model.memory"
    with pytest.raises(ModelError):
        fitting_batch(torch.device("cuda"), lambda: holding(0)[0]([1]))


@pytest.mark.parametrize(("megabytes", "batch"), [(1000.0, 3), (5000.0, 1), (0.0, 64)])
def test_a_gpu_gets_as_many_as_half_of_its_free_memory_holds(monkeypatch, megabytes, batch):
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7000 * 2**20, 9000 * 2**20))
    monkeypatch.setattr(memory, "peak_during", lambda device, one: (one(), megabytes))
    assert fitting_batch(torch.device("cuda"), lambda: asked.append(1)) == batch and asked == [1, 1]
    assert fitting_batch(CPU, lambda: asked.append(1)) == 8 and asked == [1, 1]


def test_memory_is_released_where_that_is_possible():
    release_memory()
