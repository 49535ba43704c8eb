"""Host memory to copy from, here on a machine without an accelerator."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from autoflux.runtime.pinned import PinnedBuffer
from tests.runtime.fakes import CPU


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 3_000_001])
def test_a_buffer_has_exactly_the_bytes_asked_for(nbytes):
    buffer = PinnedBuffer(nbytes, CPU)
    assert buffer.tensor.dtype == torch.uint8
    assert buffer.tensor.shape == (nbytes,)
    assert buffer.nbytes == nbytes
    buffer.tensor.fill_(7)
    assert int(buffer.tensor.sum()) == 7 * nbytes


def test_buffers_share_no_page():
    buffers = [PinnedBuffer(100, CPU) for _ in range(20)]
    places = [buffer.tensor.data_ptr() for buffer in buffers]
    assert all(place % mmap.PAGESIZE == 0 for place in places)
    assert len(set(places)) == 20


def test_the_cpu_copies_from_any_memory_at_full_speed():
    assert PinnedBuffer(10, CPU).pinned
    assert not PinnedBuffer(10, torch.device("mps")).pinned


def test_a_view_outlives_the_buffer():
    buffer = PinnedBuffer(1 << 20, CPU)
    view = buffer.tensor[:1000].view(torch.float32)
    view.fill_(3)
    del buffer
    gc.collect()
    others = [PinnedBuffer(1 << 20, CPU).tensor.fill_(1) for _ in range(5)]
    assert torch.equal(view, torch.full((250,), 3.0))
    assert len(others) == 5


def test_memory_goes_back_to_the_system():
    for _ in range(300):
        PinnedBuffer(1 << 34, CPU)  # 5 TB in all, were they kept; pages that are not touched take nothing


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_without_cuda_there_is_no_memory_for_it():
    with pytest.raises((RuntimeError, AssertionError)):
        PinnedBuffer(4096, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_memory_is_registered_and_a_refusal_is_survived():
    from autoflux.runtime import pinned

    device = torch.device("cuda")
    buffer = PinnedBuffer(1 << 20, device)
    assert buffer.pinned
    assert buffer.tensor.is_pinned()
    assert not PinnedBuffer(0, device).pinned
    # Registered already: refused. What runs next on the device must not hear of it.
    assert not pinned._register(buffer.tensor)
    assert float(torch.ones(4, device=device).sum()) == 4
    torch.cuda.synchronize()
