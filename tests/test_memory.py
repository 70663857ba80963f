"""What is counted is what was allocated; no number here depends on what a kernel takes."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch

from ringmark.inversion.memory import memory_kilobytes, peak_during, release_memory, stored_bytes

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


def test_memory_is_released_where_that_is_possible():
    release_memory()
