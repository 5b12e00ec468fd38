"""The emulator in which CUDA kernels are tested without a GPU: it runs right kernels and catches wrong ones."""

from __future__ import annotations

import ctypes
import functools

import cuda_emulator
import pytest
import torch
from cuda_emulator import Emulator
from torch import Tensor

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="the emulator of CUDA kernels needs g++")


@functools.cache
def emulator() -> Emulator:
    """Return the kernels of emulator/checks.cu."""
    found = Emulator(cuda_emulator.build([cuda_emulator.HERE / "checks.cu"], []))
    found.library.run_check.restype = ctypes.c_char_p
    return found


def run(
    kernel: str,
    x: Tensor | None = None,
    *,
    blocks: int = 1,
    threads: int = 64,
    shared: int = 0,
    argument: int = 0,
    size: int = 0,
) -> Tensor:
    """Return the output of a kernel on x: `size` float32, or as many as x has where that is 0."""
    x = torch.zeros(4096) if x is None else x
    out = torch.full((size or x.numel(),), -1.0)
    error = emulator().library.run_check(
        kernel.encode(),
        blocks,
        threads,
        ctypes.c_size_t(shared),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        argument,
    )
    if error is not None:
        raise RuntimeError(error.decode())
    return out


def test_right_kernels():
    x = torch.randn(5, 128)
    for seed in range(3):
        emulator().seed(seed)
        rotated = run("rotate", x, blocks=5, threads=128, shared=512, argument=7)
        assert rotated.equal(x.roll(-7, 1).flatten())
        assert run("copy_async", x[:2], threads=128, shared=1024).equal(x[:2].flip(1).flatten())
    whole = torch.randint(-100, 100, (128,)).float()
    assert run("sum_by_shuffles", whole, threads=128).equal(whole.view(4, 32).sum(1).repeat_interleave(32))


@pytest.mark.parametrize("kernel", ["rotate_without_barrier", "previous_without_barrier"])
def test_a_missing_barrier_is_seen(kernel):
    x = torch.randn(6, 96)
    shifted = torch.cat([torch.zeros(6, 1), x[:, :-1]], 1)
    right = x.roll(-3, 1) if kernel == "rotate_without_barrier" else shifted
    assert not run(kernel, x, blocks=6, threads=96, shared=384, argument=3).view(6, 96).equal(right)


@pytest.mark.parametrize(
    "kernel, message",
    [
        ("barrier_in_two_branches", r"threads wait at different barriers: thread \(0, 0, 0\) waits in __syncthreads"),
        ("shuffle_at_two_places", "waits in __shfl_xor_sync at checks.cu:.* while thread .* waits in __shfl_xor_sync"),
        ("shuffle_from_outside_the_mask", r"__shfl_xor_sync at checks.cu:\d+ reads from lane 16, not in its mask"),
        ("shuffle_with_the_ended", r"thread \(7, 0, 0\),? (which )?has ended"),
    ],
)
def test_threads_that_do_not_meet(kernel, message):
    x = torch.randn(64)
    with pytest.raises(RuntimeError, match=f"{kernel}: block .*{message}"):
        run(kernel, argument=7)
    assert run("rotate", x, shared=256, argument=2).equal(x.roll(-2))  # An error leaves no trace.


def test_accesses_past_shared_memory():
    with pytest.raises(RuntimeError, match="access 4096 bytes past its 1024 bytes of shared memory"):
        run("read_shared_at", shared=1024, argument=1024 + 4096)
    run("write_shared_at", shared=1000, argument=999)
    with pytest.raises(RuntimeError, match="write past its 1000 bytes of shared memory"):
        run("write_shared_at", shared=1000, argument=1000)
    with pytest.raises(RuntimeError, match="write before its shared memory"):
        run("write_shared_at", shared=1000, argument=-1)


@pytest.mark.parametrize("numel", [1, 4, 5000])
def test_accesses_past_a_guarded_tensor(numel):
    inside = emulator().guarded(torch.arange(float(numel)))
    assert run("read_at", inside, argument=numel - 1, size=64)[0] == numel - 1
    with pytest.raises(RuntimeError, match=r"access of global memory that is not there, near checks\.cu"):
        run("read_at", inside, argument=-(-numel // 4) * 4, size=64)
    run("write_at", inside, argument=numel - 1, size=64)
    if numel % 4 != 0:
        with pytest.raises(RuntimeError, match=f"write past the end of a tensor of {4 * numel} bytes"):
            run("write_at", inside, argument=numel, size=64)


def test_misaligned_accesses():
    x = emulator().guarded(torch.arange(64.0))
    assert run("read_16_bytes_at", x, argument=8).equal(torch.full((64,), 8.0))
    with pytest.raises(RuntimeError, match=r"undefined behaviour .*, near "):
        run("read_16_bytes_at", x, argument=9)
    with pytest.raises(RuntimeError, match="of 8 bytes at no multiple of that"):
        run("copy_misaligned", shared=1024)


def test_copies_that_nobody_waits_for():
    x = torch.randn(2, 64)
    out = run("copy_async", x, shared=512, argument=1).view(2, 64)
    assert out[0].equal(x[0].flip(0)) and out[1].isnan().all()
    assert run("copy_to_where_others_read", x[0], shared=256).isnan().any()


def test_launches_that_a_gpu_refuses():
    with pytest.raises(RuntimeError, match="cudaErrorInvalidConfiguration"):
        run("read_at", threads=1025)
    run("rotate", torch.randn(64), shared=232448)
    with pytest.raises(RuntimeError, match="232449 bytes of shared memory, without asking for more than 232448"):
        run("rotate", torch.randn(64), shared=232449)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_numbers_of_16_bits(dtype):
    """Every number widens, and float32 in the middle between two numbers or one bit beside it round as in torch."""
    suffix = str(dtype).removeprefix("torch.")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    wide = run(f"widen_{suffix}", every.view(torch.float32), blocks=256, threads=256, size=2**16)
    assert wide[~every.isnan()].equal(every[~every.isnan()].float()) and wide[every.isnan()].isnan().all()

    numbers = wide[wide.isfinite()]
    following = torch.nextafter(numbers.to(dtype), torch.tensor(torch.inf, dtype=dtype)).float()
    middle = ((numbers.double() + following.double()) / 2).float()
    beside = [torch.nextafter(middle, torch.tensor(sign * torch.inf)) for sign in (-1, 1)]
    x = torch.cat([numbers, middle, *beside, torch.tensor([3.4e38, -3.4e38, torch.inf, torch.nan])])
    x = torch.cat([x, x.new_zeros(-x.numel() % 256)])
    found = run(f"narrow_{suffix}", x, blocks=x.numel() // 256, threads=256, size=x.numel() // 2).view(dtype)
    assert found[~x.isnan()].view(torch.int16).equal(x[~x.isnan()].to(dtype).view(torch.int16))
    assert found[x.isnan()].isnan().all()
