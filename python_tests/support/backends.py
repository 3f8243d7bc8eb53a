"""The implementations that must agree, and the table of cases they are tried on."""

import contextlib
import functools
import types
from dataclasses import dataclass

import cuda_on_cpu
import pytest
import torch

from lomo_kernels.ops import native

# Around every vector (4, 8), block (1024, 2048, 4096) and chunk (16384) edge.
SIZES = (
    0, 1, 7, 8, 9, 15, 16, 17, 127, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 6150,
    20_000,
)  # fmt: skip

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = ((F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32))
FORMATS = [
    (param, grad, rounding)
    for param, grad in PAIRS
    for rounding in ("nearest", "stochastic", "split")
    if not (param is F16 and rounding == "split")
]


def format_id(value):
    return "-".join(str(v).removeprefix("torch.") for v in value)


def needs(name):
    """Skips a test of the backend `name` where its package is missing or too old."""
    if name == "triton":
        triton = pytest.importorskip("triton", reason="triton is not installed")
        if not hasattr(triton, "knobs"):
            pytest.skip(f"the kernels need triton 3.4 or later, got {triton.__version__}")


@dataclass(frozen=True)
class Backend:
    id: str
    name: str
    device: str = "cpu"

    @contextlib.contextmanager
    def active(self):
        """Makes `backend=self.name` mean this implementation."""
        if self.id.startswith("native-"):
            before = native._C.cpu_instruction_set()
            native._C.cpu_use_instruction_set(self.id.removeprefix("native-"))
            try:
                yield
            finally:
                native._C.cpu_use_instruction_set(before)
        elif self.id == "cuda_on_cpu":
            before = native._C
            native._C = _cuda_in_place_of_cpu(before)
            try:
                yield
            finally:
                native._C = before
        else:
            needs(self.name)
            yield


COUNTERS = torch.zeros(native._C.tickets, dtype=torch.int32)


def _cuda_in_place_of_cpu(real):
    cuda = cuda_on_cpu.module()

    def on_cuda(name):
        def call(*arguments):
            *arguments, _threads = arguments
            if name == "grad_sumsq":  # every call finds the counters as the one before left them
                arguments += COUNTERS.data_ptr(), False
            getattr(cuda, f"cuda_{name}")(*arguments, 0, 0)

        return call

    names = [name.removeprefix("cpu_") for name in dir(real) if name.startswith("cpu_")]
    return types.SimpleNamespace(
        **{name: getattr(real, name) for name in dir(real) if not name.startswith("_")}
        | {f"cpu_{name}": on_cuda(name) for name in names if hasattr(cuda, f"cuda_{name}")}
    )


@functools.cache
def backends():
    """Every implementation that can run here, except the reference they are compared with."""
    before = native._C.cpu_instruction_set()
    sets = [s for s in ("baseline", "avx2", "avx512") if native._C.cpu_use_instruction_set(s)]
    native._C.cpu_use_instruction_set(before)
    found = [Backend(f"native-{s}", "native") for s in sets]
    found.append(Backend("cuda_on_cpu", "native"))
    if torch.cuda.is_available():
        found.append(Backend("cuda-native", "native", "cuda"))
        found.append(Backend("cuda-triton", "triton", "cuda"))
        found.append(Backend("cuda-reference", "reference", "cuda"))
    else:
        found.append(Backend("triton-interpreter", "triton"))
    return found


def implementations(*slow):
    """`backends` for parametrize; those of these names take long in the tests of a file."""
    return [
        pytest.param(found, id=found.id, marks=[pytest.mark.slow] * (found.id in slow))
        for found in backends()
    ]


def bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype is F32 else torch.int16)


def same_bits(a, b):
    """Bit equality, with every NaN equal to every other."""
    a, b = a.cpu(), b.cpu()
    return bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())


def random_values(n, dtype):
    return torch.randn(n).to(dtype)


def random_bits(n, dtype):
    """Every pattern: NaN, infinities, subnormals, -0 and the rest of the range."""
    if dtype is F32:
        some = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int64).to(torch.int32)
        # Random fp32 patterns seldom are special: a third of them are put there.
        special = torch.tensor([0, -(2**31), 0x7F800000, -0x800000, 0x7FC00000, 1, 0x7FFFFF])
        pick = special[torch.randint(0, len(special), (n,))].to(torch.int32)
        return torch.where(torch.rand(n) < 1 / 3, pick, some).view(F32)
    return torch.randint(-(2**15), 2**15, (n,), dtype=torch.int16).view(dtype)


def shifted(tensor, elements, device):
    """A copy of a flat tensor that starts `elements` past an aligned address."""
    buffer = torch.zeros(tensor.numel() + elements + 16, dtype=tensor.dtype, device=device)
    view = buffer[elements : elements + tensor.numel()]
    return view.copy_(tensor)
