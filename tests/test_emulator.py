"""The emulator in which CUDA kernels are tested without a GPU: it runs right kernels, and catches wrong ones."""

from __future__ import annotations

import ctypes
import functools
import os
import re

import cuda_emulator
import pytest
import torch
from cuda_emulator import Emulator, Launch
from torch import Tensor

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="the emulator of CUDA kernels needs g++")

Size = int | tuple[int, int, int]


@functools.cache
def emulator() -> Emulator:
    """The kernels of emulator/checks.cu."""
    found = Emulator(cuda_emulator.build([cuda_emulator.HERE / "checks.cu"], []))
    found.library.run_check.restype = ctypes.c_char_p
    return found


def run(
    kernel: str,
    x: Tensor | None = None,
    *,
    grid: Size = 1,
    threads: Size = 64,
    shared: int = 0,
    argument: int = 0,
    size: int = 0,
    ask: bool = True,
) -> Tensor:
    """The output of a kernel on x, `size` float32 (as many as x has where that is 0)."""
    x = torch.zeros(4096) if x is None else x
    out = torch.full((size or x.numel(),), -1.0)
    three = [(side, 1, 1) if isinstance(side, int) else side for side in (grid, threads)]
    error = emulator().library.run_check(
        kernel.encode(),
        *((ctypes.c_uint * 3)(*side) for side in three),
        ctypes.c_size_t(shared),
        ctypes.c_bool(ask),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
        argument,
    )
    if error is not None:
        raise RuntimeError(error.decode())
    return out


def test_indices_of_threads_and_blocks():
    out = run("indices", grid=(3, 2, 5), threads=(4, 3, 2), size=720)
    assert out.equal(torch.arange(720.0))


def test_shared_memory_and_barriers():
    x = torch.randn(5, 128)
    assert run("reverse", x, grid=5, threads=128, shared=512).equal(x.flip(1).flatten())
    assert run("rotate", x, grid=5, threads=128, shared=512, argument=7).equal(x.roll(-7, 1).flatten())


def test_threads_that_ended_are_not_waited_for():
    x = torch.randn(64)
    assert run("end_before_the_barrier", x, shared=128)[:32].equal(x[:32].flip(0))


@pytest.mark.parametrize(
    "kernel",
    ["reverse_without_barrier", "previous_without_barrier", "rotate_without_barrier", "read_what_nobody_wrote"],
)
def test_a_missing_barrier_is_seen(kernel):
    x = torch.randn(6, 96)
    right = {
        "reverse_without_barrier": x.flip(1),
        "previous_without_barrier": torch.cat([torch.zeros(6, 1), x[:, :-1]], 1),
        "rotate_without_barrier": x.roll(-3, 1),
        "read_what_nobody_wrote": torch.ones(6, 96),
    }[kernel]
    out = run(kernel, x, grid=6, threads=96, shared=384, argument=3).view(6, 96)
    assert not out.equal(right)
    assert kernel == "rotate_without_barrier" or out.isnan().any()


def test_blocks_run_in_more_than_one_order():
    """Every seed gives right kernels the same results, and wrong ones others."""
    x = torch.randn(1, 96)
    wrong = set()
    for seed in range(6):
        emulator().seed(seed)
        assert run("reverse", x, threads=96, shared=384).equal(x.flip(1).flatten())
        wrong.add(tuple(run("previous_without_barrier", x, threads=96, shared=384).isnan().tolist()))
    assert len(wrong) > 2


@pytest.mark.parametrize(
    "kernel, message",
    [
        (
            "barrier_in_two_branches",
            r"threads wait at different barriers: thread \(0, 0, 0\) waits in __syncthreads at",
        ),
        (
            "barrier_against_shuffle",
            r"waits in __shfl_xor_sync at checks.cu:\d+ for ever: thread \(5, 0, 0\) waits in __s",
        ),
        (
            "shuffle_at_two_places",
            r"waits in __shfl_xor_sync at checks.cu:\d+ while thread .* waits in __shfl_xor_sync at",
        ),
        ("shuffle_from_outside_the_mask", r"__shfl_xor_sync at checks.cu:\d+ reads from lane 16, not in its mask"),
    ],
)
def test_threads_that_do_not_meet(kernel, message):
    with pytest.raises(RuntimeError, match=f"{kernel}: block .*{message}"):
        run(kernel)


def test_masks_of_warps():
    with pytest.raises(RuntimeError, match="is not in the mask of its own __shfl_sync"):
        run("shuffle_outside_the_mask", argument=0xFFFF)
    with pytest.raises(RuntimeError, match="names lanes that the block does not have"):
        run("shuffle_outside_the_mask", argument=-1, threads=48)
    for seed in range(3):  # whether it has ended already or ends later
        emulator().seed(seed)
        with pytest.raises(RuntimeError, match=r"thread \(7, 0, 0\),? (which )?has ended"):
            run("shuffle_with_the_ended", argument=7, threads=32)


@pytest.mark.parametrize("width", [32, 8])
def test_shuffles(width):
    x = torch.randn(64)
    lane = torch.arange(64)
    first = lane - lane % width
    up, down, across = lane - 2, lane + 2, lane ^ 5
    out = run("shuffles", x, argument=width, size=320).view(5, 64)
    assert out[0].equal(x[first + 3])
    assert out[1].equal(x[torch.where(up < first, lane, up)])
    assert out[2].equal(x[torch.where(down >= first + width, lane, down)])
    assert out[3].equal(x[across])
    assert out[4].equal((x > 0).view(2, 32).sum(1).repeat_interleave(32).float())


def test_sums_and_halves_of_warps():
    x = torch.randint(-100, 100, (128,)).float()
    assert run("sum_by_shuffles", x, threads=128).equal(x.view(4, 32).sum(1).repeat_interleave(32))
    lane = torch.arange(128)
    assert run("shuffle_in_halves", x, threads=128).equal(x[torch.where(lane % 32 < 16, lane ^ 1, lane ^ 2)])


@pytest.mark.parametrize("byte", [1024, 1024 + 4096, 1024 + 100_000])
def test_accesses_past_shared_memory(byte):
    for kernel in ("write_at", "read_at"):
        message = rf"{kernel}: block .* thread .*: access {byte - 1024} bytes past its 1024 bytes of shared memory"
        with pytest.raises(RuntimeError, match=f"{message}, near checks.cu:"):
            run(kernel, shared=1024, argument=byte)


def test_writes_beside_shared_memory():
    """Within the 16 bytes to which shared memory is rounded up, and before it."""
    run("write_at", shared=1000, argument=999)
    with pytest.raises(RuntimeError, match="write past its 1000 bytes of shared memory"):
        run("write_at", shared=1000, argument=1000)
    with pytest.raises(RuntimeError, match="write before its shared memory"):
        run("write_at", shared=1000, argument=-1)


@pytest.mark.parametrize("numel", [1, 3, 4, 1024, 5000])
def test_accesses_past_a_guarded_tensor(numel):
    x = torch.randn(numel)
    inside = emulator().guarded(x)
    assert inside.equal(x) and inside.data_ptr() % 16 == 0
    assert run("read_global_at", inside, argument=numel - 1, size=64)[0] == x[-1]
    with pytest.raises(RuntimeError, match=r"access of global memory that is not there, near checks\.cu"):
        run("read_global_at", inside, argument=-(-numel // 4) * 4, size=64)


def test_writes_past_a_guarded_tensor():
    x = emulator().guarded(torch.zeros(5))
    run("write_global_at", x, argument=4, size=64)
    with pytest.raises(RuntimeError, match="write past the end of a tensor of 20 bytes"):
        run("write_global_at", x, argument=5, size=64)
    del x
    run("write_global_at", torch.zeros(5), argument=4, size=64)


def test_guarded_tensors_of_any_shape_and_dtype():
    for x in (torch.randn(3, 0), torch.randn(4, 6).t(), torch.arange(7), torch.rand(2, 3, 5) > 0.5):
        copy = emulator().guarded(x)
        assert copy.equal(x) and copy.dtype == x.dtype and copy.is_contiguous()


@pytest.mark.parametrize(
    "kernel, right, wrong",
    [("read_16_bytes_at", 8, 9), ("read_local_at", 3, 4), ("overflow_an_int", 1000, 100_000)],
)
def test_undefined_behaviour(kernel, right, wrong):
    x = torch.arange(64.0)
    expected = {"read_16_bytes_at": x[8:12].repeat(64), "read_local_at": x[3].expand(256)}.get(kernel)
    out = run(kernel, x, argument=right, size=256, threads=64)
    assert expected is None or out[:64].equal(expected[:64])
    with pytest.raises(RuntimeError, match=r"undefined behaviour .*, near checks.cu:\d+"):
        run(kernel, x, argument=wrong, size=256)


def test_too_many_local_variables():
    with pytest.raises(RuntimeError, match="bytes of local variables"):
        run("too_many_locals", argument=300 * 1024)


def test_work_goes_on_after_an_error():
    x = torch.randn(128)
    for _ in range(5):
        for kernel in ("barrier_in_two_branches", "read_global_at", "shuffle_at_two_places", "barrier_against_shuffle"):
            with pytest.raises(RuntimeError):
                run(kernel, x, threads=128, argument=10**9)
            assert run("rotate", x, threads=128, shared=512, argument=2).equal(x.roll(-2))


def test_asynchronous_copies():
    x = torch.randn(2, 64)
    out = run("copy_async", x, shared=512).view(2, 64)
    assert out.equal(x.flip(1))
    out = run("copy_with_zeros", x[0], threads=16, shared=256, argument=8).view(16, 4)
    assert out[:, :2].equal(x[0].view(16, 4)[:, :2]) and not out[:, 2:].any()


def test_copies_that_nobody_waits_for():
    x = torch.randn(2, 64)
    out = run("copy_async", x, shared=512, argument=1).view(2, 64)
    assert out[0].equal(x[0].flip(0)) and out[1].isnan().all()
    assert run("copy_async", x, shared=512, argument=2).isnan().all()
    assert run("copy_to_where_others_read", x[0], shared=256).isnan().any()


@pytest.mark.parametrize(
    "kernel, argument, message",
    [
        ("copy_bytes", 12, "of 12 bytes"),
        ("copy_misaligned", 0, "of 8 bytes at no multiple of that"),
        ("copy_past_the_end", 256, "to outside its shared memory"),
        ("copy_with_zeros", 17, "more of them zeros"),
    ],
)
def test_asynchronous_copies_that_cuda_refuses(kernel, argument, message):
    with pytest.raises(RuntimeError, match=message):
        run(kernel, argument=argument, shared=1024)


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 1025},
        {"threads": (32, 32, 2)},
        {"threads": (1, 1, 65)},
        {"threads": 0},
        {"grid": (1, 65536, 1)},
        {"grid": (1, 1, 65536)},
        {"grid": (1 << 31, 1, 1)},
    ],
    ids=str,
)
def test_launches_of_wrong_sizes(wrong):
    with pytest.raises(RuntimeError, match=r"indices: a (block|grid) of .*cudaErrorInvalidConfiguration"):
        run("indices", **wrong)


def test_limits_of_shared_memory(monkeypatch):
    x = torch.randn(64)
    with pytest.raises(RuntimeError, match=r"49153 bytes of shared memory, without asking.*cudaErrorInvalidValue"):
        run("sum_by_shuffles", x, shared=48 * 1024 + 1, ask=False)
    for shared in (232448, 100_000):
        run("reverse", x, shared=shared)
        with pytest.raises(
            RuntimeError, match=f"{shared + 1} bytes of shared memory, without asking for more than {shared}"
        ):
            monkeypatch.setenv("SPARSECNX_EMULATOR_SHARED_BYTES", str(shared))
            run("reverse", x, shared=shared + 1)


def test_a_grid_without_blocks_is_nothing_to_do():
    assert run("indices", grid=0, size=4).equal(torch.full((4,), -1.0))


def test_integer_atomics():
    out = run("count", torch.zeros(1), grid=7, threads=64, argument=3)
    assert out.view(torch.int32).item() == torch.tensor(-1.0).view(torch.int32).item() + 7 * 64 * 3


HALVES = {torch.bfloat16: 0, torch.float16: 1}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_number_of_16_bits(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    out = run("widen_and_narrow", bits, grid=256, threads=256, argument=HALVES[dtype], size=2**16 + 2**15)
    wide, again = out[: 2**16], out[2**16 :].view(torch.int16)
    numbers = bits.view(dtype)
    nan = numbers.isnan()
    assert wide[~nan].view(torch.int32).equal(numbers[~nan].float().view(torch.int32))
    assert again[~nan].equal(bits[~nan])
    assert wide[nan].isnan().all() and again.view(dtype)[nan].isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_to_16_bits(dtype):
    """Random float32 of every magnitude, and all that lie in the middle between two neighbours or one bit beside it."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    numbers = numbers[numbers.isfinite()]
    following = torch.nextafter(numbers.to(dtype), torch.tensor(torch.inf, dtype=dtype)).float()
    middle = ((numbers.double() + following.double()) / 2).float()
    beside = [torch.nextafter(middle, torch.tensor(sign * torch.inf)) for sign in (-1, 1)]
    anything = torch.randint(-(2**31), 2**31, (2**16,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    limits = torch.tensor([65504.0, 65519.996, 65520.0, 65536.0, 3.4e38, torch.inf, 2.0**-24, 2.0**-25, 2.0**-26])
    x = torch.cat([numbers, middle, *beside, anything, limits, -limits])
    x = torch.cat([x, x.new_zeros(-x.numel() % 256)])
    out = run("narrow_all", x, grid=x.numel() // 256, threads=256, argument=HALVES[dtype], size=x.numel() // 2)
    found, nan = out.view(dtype), x.isnan()
    assert found[~nan].view(torch.int16).equal(x[~nan].to(dtype).view(torch.int16))
    assert found[nan].isnan().all()


def test_launches_can_be_observed():
    emulator().forget_launches()
    run("indices", grid=(2, 3, 1), threads=(8, 4, 1))
    run("rotate", torch.randn(64), shared=1024)
    first, second = emulator().launches()
    assert first == Launch(first.kernel, (2, 3, 1), (8, 4, 1), 0)
    assert second == Launch(second.kernel, (1, 1, 1), (64, 1, 1), 1024)
    assert re.search(r"::indices\(float const\*, float\*, int\)$", first.kernel)
    assert re.search(r"::rotate<true>\(float const\*, float\*, int\)$", second.kernel)


def test_sources_are_compiled_once(monkeypatch):
    monkeypatch.setattr(cuda_emulator, "run", lambda command: pytest.fail(f"compiles again: {command}"))
    emulator.cache_clear()
    assert os.path.exists(emulator().path)
