"""Index arithmetic past 2^31 and 2^32 elements, on memory that is mostly an address range.

A tensor of 2^31 bf16 elements takes 4 GiB. Here pages that nobody writes cost nothing, and the
pages of the parameter, which the CPU loop writes, are one piece of memory mapped over and over.
What counts the resident pages of a process finds 4 GB, and what is held is 0.2 GB.
"""

import ctypes
import mmap
import os

import cuda_on_cpu
import pytest
import torch

from lomo_kernels import ops
from lomo_kernels.ops import native

FAR = [2**31 - 1, 2**31, 2**31 + 5, 2**32 + 7]
PIECE = 1 << 26  # bytes
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def map_memory(address, size, flags, file=-1):
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    result = libc.mmap(address, size, protection, flags, file, 0)
    if result in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    return result


class AddressRange:
    """`count` 16-bit elements, all zero, of which only what is touched takes memory."""

    def __init__(self, count, repeat_until=None):
        self.size = -(-count * 2 // PIECE) * PIECE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self.address = map_memory(None, self.size, flags)
        if repeat_until is not None:
            file = os.memfd_create("repeated")
            os.ftruncate(file, PIECE)
            for start in range(0, repeat_until * 2 // PIECE * PIECE, PIECE):
                map_memory(self.address + start, PIECE, mmap.MAP_SHARED | MAP_FIXED, file)
            os.close(file)

    def elements(self, start, count):
        """A tensor of bf16 on elements [start, start + count)."""
        buffer = (ctypes.c_int16 * count).from_address(self.address + 2 * start)
        return torch.frombuffer(buffer, dtype=torch.int16).view(torch.bfloat16)

    def close(self):
        libc.munmap(self.address, self.size)


@pytest.fixture
def ranges(request):
    made = []

    def make(count, repeat_until=None):
        made.append(AddressRange(count, repeat_until))
        return made[-1]

    yield make
    for memory in made:
        memory.close()


@pytest.mark.slow
def test_cpu_loop(ranges):
    """The whole loop over 2^31 + 4096 elements: the far ones change, nothing else does."""
    count = 2**31 + 4096
    p, g = ranges(count, repeat_until=2**31 - PIECE), ranges(count)
    far = [k for k in FAR if k < count]
    for k in far:
        g.elements(k, 1).fill_(1.0)
    ops.lomo_update_(p.elements(0, count), g.elements(0, count), lr=1.0, backend="native")
    for k in far:
        assert p.elements(k, 1).item() == -1.0
    assert p.elements(count - 8192, 8192).count_nonzero() == len(far)
    assert p.elements(0, PIECE // 2).count_nonzero() == 0  # also every aliased page below

    sumsq, found = torch.zeros(1), torch.zeros(1)
    ops.grad_sumsq_(sumsq, g.elements(0, count), found_inf=found, backend="native")
    assert (sumsq.item(), found.item()) == (len(far), 0.0)
    g.elements(far[-1], 1).fill_(float("inf"))
    ops.grad_sumsq_(sumsq, g.elements(0, count), found_inf=found, backend="native")
    assert found.item() == 1.0


@pytest.mark.slow
def test_cpu_loop_of_adalomo(ranges):
    """All three sweeps over a matrix of 2^31 + 4096 elements."""
    rows, cols = 2**19 + 1, 4096
    p, g = ranges(rows * cols, repeat_until=2**31 - PIECE), ranges(rows * cols)
    far = [k for k in FAR if k < rows * cols]
    for k in far:
        g.elements(k, 1).fill_(1.0)
    param, grad = (m.elements(0, rows * cols).view(rows, cols) for m in (p, g))
    state = ops.adalomo_state(param)
    ops.adalomo_update_(param, grad, state, lr=1.0, backend="native")
    for k in far:
        assert p.elements(k, 1).item() < 0.0
    assert p.elements(rows * cols - 8192, 8192).count_nonzero() == len(far)
    assert p.elements(0, PIECE // 2).count_nonzero() == 0
    assert (state["exp_avg_sq_row"] > 1e-6).nonzero().flatten().tolist() == [
        *sorted({k // cols for k in far})
    ]
    assert (state["exp_avg_sq_col"] > 1e-6).nonzero().flatten().tolist() == [
        *sorted({k % cols for k in far})
    ]


@pytest.mark.parametrize("far", FAR)
def test_cuda_kernel_bodies(ranges, far):
    """The blocks of a grid of 2^33 elements that hold the far one, and their neighbours."""
    count = 2**33
    p, g = ranges(count), ranges(count)
    g.elements(far, 1).fill_(1.0)
    module, library = cuda_on_cpu.module(), cuda_on_cpu.library()
    rows = torch.tensor([p.address, g.address, 0, count, 0, 0])
    block = far // 4096
    library.test_only_blocks(block - 1, block + 1)
    try:
        module.cuda_lomo_update(
            rows.data_ptr(), 1, native._C.dtypes["bfloat16"], native._C.dtypes["bfloat16"],
            native._C.roundings["nearest"], 1.0, 1.0, float("inf"), 0, 0, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip
        assert p.elements(far, 1).item() == -1.0
        assert p.elements(far - 2048, 4096).count_nonzero() == 1
        for wrapped in {far % 2**31, far % 2**32} - {far}:
            assert p.elements(wrapped, 1).item() == 0.0

        chunk = far // native.NORM_CHUNK
        library.test_only_blocks(chunk - 1, chunk + 1)
        partials = torch.zeros(count // native.NORM_CHUNK)
        rows = torch.tensor([g.address, count])
        total, counters = torch.zeros(1), torch.zeros(native._C.tickets, dtype=torch.int32)
        module.cuda_grad_sumsq(
            rows.data_ptr(), 1, native._C.dtypes["bfloat16"], 0, 0, total.data_ptr(),
            partials.data_ptr(), counters.data_ptr(), False, 0, 0,
        )  # fmt: skip
        assert counters.tolist() == [3] + [0] * (len(counters) - 1)  # the last block is not there
        assert partials.nonzero().flatten().tolist() == [chunk]
        assert partials[chunk] == 1.0

        rows, cols = count // 4096, 4096
        tile = far // cols // 64 * (cols // 256) + far % cols // 256
        library.test_only_blocks(tile - 1, tile + 1)
        sums = torch.zeros(count // native.NORM_CHUNK)
        fields = {"param": g.address, "sums": sums.data_ptr(), "numel": count, "factored": 1}
        fields |= {"batch": 1, "rows": rows, "cols": cols}
        row = torch.tensor([fields.get(name, 0) for name in native._C.structs["AdaRef"]])
        module.cuda_adalomo_sums(row.data_ptr(), native._C.dtypes["bfloat16"], 0, 0)
        assert sums.nonzero().flatten().tolist() == [tile]
    finally:
        library.test_only_blocks(0, 2**32 - 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, a GPU is here")
@pytest.mark.parametrize("far", FAR)
def test_triton_kernels(ranges, far, monkeypatch):
    from triton.runtime import interpreter

    from lomo_kernels.ops import reference
    from lomo_kernels.ops.triton import adalomo, common, grad_sumsq, lomo_update, product_update

    def program(number):
        builder = interpreter.interpreter_builder
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: at(builder, number))

    def at(builder, number):
        builder.grid_idx = (number, 0, 0)

    count = 2**33
    p, g = ranges(count), ranges(count)
    g.elements(far, 1).fill_(1.0)
    first_p, first_g = (m.elements(0, 1).view(torch.int16) for m in (p, g))
    program(far // lomo_update.BLOCK)
    lomo_update.lomo_update_kernel[(1,)](
        first_p, first_g, None, count, 0, 0, 1.0, 1.0, float("inf"), 0, 0, None, None, None, None,
        P="bfloat16", G="bfloat16", ROUNDING="nearest", GROUPED=True, SIZE=lomo_update.BLOCK,
    )  # fmt: skip
    assert p.elements(far, 1).item() == -1.0
    assert p.elements(far - 2048, 4096).count_nonzero() == 1

    chunk = far // reference.NORM_CHUNK
    program(chunk)
    partials = torch.zeros(chunk + 2)
    grad_sumsq.sumsq_chunk_kernel[(1,)](
        first_g, count, None, None, partials, G="bfloat16",
        LEVELS=11, ROWS=reference.NORM_CHUNK // reference.NORM_LANES,
    )  # fmt: skip
    assert partials.nonzero().flatten().tolist() == [chunk]

    tile = far // 4096 // 64 * 16 + far % 4096 // 256
    program(tile)
    sums = torch.zeros(tile + 2)
    adalomo.ada_sums_kernel[(1,)](
        first_g, sums, count // 4096, 4096, count, count // 4096 // 64, 16, P="bfloat16"
    )
    assert sums.nonzero().flatten().tolist() == [tile]

    # A weight of 2^20 x 8192, and a left factor of more than 2^32 elements: row and token far away.
    p, left = ranges(count), ranges(2**32 + 2**22)
    row, col, token = far // 8192, far % 8192, 4097
    left.elements(token * 2**20 + row, 1).fill_(1.0)
    right = torch.zeros(4098, 8192, dtype=torch.bfloat16)
    right[token, col] = 1.0
    program(row // 128 // 8 * 8 * 64 + col // 128 * 8 + row // 128 % 8)
    product_update.product_update_kernel[(1,)](
        left.elements(0, 1), right, 4098, 2**20, 8192, None, 0,
        p.elements(0, 1).view(torch.int16), None, 2**20, 8192, 0, 0,
        1.0, 1.0, float("inf"), 0, 0, None, None, None, None,
        P="bfloat16", FACTOR=common.type_of(torch.bfloat16), ROUNDING="nearest", GROUPED=True,
        ALIGNED=False, BM=128, BN=128, BK=64,
    )  # fmt: skip
    assert p.elements(far, 1).item() == -1.0
    assert p.elements(far - 2048, 4096).count_nonzero() == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, a GPU is here")
def test_gram_matrices_of_far_tokens(ranges):
    """Rows of a factor that lie 2^23 elements apart: the last of 600 is past 2^32."""
    left = ranges(600 * 2**23).elements(0, 599 * 2**23 + 16).as_strided((600, 16), (2**23, 1))
    for token in (0, 300, 599):
        left[token, token % 16] = 2.0
    right = torch.ones(600, 16, dtype=torch.bfloat16)
    sumsq, magnitude = torch.zeros(1), torch.zeros(1)
    ops.product_sumsq_(sumsq, magnitude, [[(left, right)]], backend="triton")
    assert sumsq == (left[[0, 300, 599]].T.double() @ right[:3].double()).square().sum()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_on_the_gpu(backend):
    count = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 10 * count:
        pytest.skip(f"needs {10 * count / 2**30:.0f} GiB of free GPU memory")
    p, g = (torch.zeros(count, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    g[2**31 + 5] = 1.0
    ops.lomo_update_(p, g, lr=1.0, backend=backend)
    assert p.count_nonzero() == 1
    assert p[2**31 + 5] == -1.0
    sumsq = torch.zeros(1, device="cuda")
    ops.grad_sumsq_(sumsq, g, backend=backend)
    assert sumsq.item() == 1.0
    p.zero_()
    matrix, state = p.view(-1, 4096), ops.adalomo_state(p.view(-1, 4096))
    ops.adalomo_update_(matrix, g.view(-1, 4096), state, lr=1.0, backend=backend)
    assert p.count_nonzero() == 1
    assert p[2**31 + 5] < 0.0
