"""What the compilers made of the kernels, checked without a GPU."""

import collections
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sass

from lomo_kernels.ops import native

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SCALARS = ("decide", "product_sums")  # kernels that read and write nothing else
# A fused multiply-add (but not FMUL, FADD), flushing of subnormals, access to local memory.
FORBIDDEN = re.compile(r"FFMA|DFMA|HFMA2\.BF16|.*\.FTZ|LDL|STL")
# Above 96 registers fewer than 20 warps fit on a multiprocessor: too few loads in flight.
MAX_REGISTERS = 96


# A tile of a product lives in them: one block of 256 threads on a multiprocessor, and no spill.
MAX_REGISTERS_OF_PRODUCT = 255


def forbidden(name, counts):
    if name.endswith(("of-float32-nearest", "of-float32")):  # a product in fp32 is made of them
        return [op for op in counts if re.fullmatch("LDL|STL|.*TF32.*", op)]
    # A rounded quotient and a rounded root are made of fused multiply-adds. ada_stats, ada_sums and
    # lomo_update show that the compiler was told to make none of its own.
    divides = re.search("decide|ada_(moments|norm|step|update)", name)
    pattern = "LDL|STL" if divides else FORBIDDEN.pattern
    return [op for op in counts if re.fullmatch(pattern, op)]


def cuobjdump():
    """From the CUDA toolkit, or the one that Triton carries."""
    if (found := shutil.which("cuobjdump")) is not None:
        return Path(found)
    spec = importlib.util.find_spec("triton")
    carried = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    if carried is None or not carried.exists():
        pytest.skip("neither the CUDA toolkit's nor Triton's cuobjdump is installed")
    return carried


@functools.cache
def built_kernels(arch):
    """Kernel -> (instruction counts, resources) of the extension module as it is installed."""
    if not native._C.cuda_architectures:
        pytest.skip("the extension module was built without CUDA (no nvcc)")
    if not re.search(rf"\b{arch}\b", native._C.cuda_architectures):
        pytest.skip(f"the extension module holds no code for sm_{arch}")
    tool = cuobjdump()

    def dump(option):
        command = [tool, "-arch", f"sm_{arch}", option, native._C.__file__]
        environment = {"PATH": f"{tool.parent}:{os.environ['PATH']}"}
        return subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        ).stdout

    pattern = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
    kernels = {}
    for part in dump("-sass").split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        counts = collections.Counter(re.findall(pattern, body))
        kernels[name.strip()] = counts, sass.instructions(body)
    resources = {}
    for name, usage in re.findall(r"Function (\w+):\s+(REG:.*)", dump("-res-usage")):
        resources[name] = {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", usage)}
    assert kernels.keys() == resources.keys()
    return {name: (*kernels[name], resources[name]) for name in kernels}


@pytest.mark.parametrize("arch", ["80", "86", "89", "90", "100", "120"])
def test_cuda(arch):
    kernels = built_kernels(arch)
    # 13 format and rounding combinations and 3 gradient formats, each for one tensor and for two
    # sizes of table; the decision of a step. AdaLomo: updates and norms for one matrix, a table of
    # them and two of vectors; squares of gradients, that are clipped by value or not, and moments
    # for one matrix and a table; the size of a step for three tables; squares of parameters; a
    # part's sums for other ranks.
    assert len(kernels) == 3 * (13 + 3) + 1 + 4 * (13 + 3) + 2 * (6 + 1) + 3 + 3 + 1
    for name, (counts, _, resources) in kernels.items():
        assert not forbidden(name, counts), name
        assert resources["STACK"] == 0, name
        assert resources["LOCAL"] == 0, name
        assert resources["REG"] <= MAX_REGISTERS, name
        wide_loads = sum(n for op, n in counts.items() if re.match(r"LDG.*\.128", op))
        wide_stores = sum(n for op, n in counts.items() if re.match(r"STG.*\.128", op))
        if "lomo_update_kernel" in name:
            formats = [int(width) for width in re.findall(r"(?:BFloat|Float)(16|32)", name)[:2]]
            split = "Rounding2" in name or "RoundingE2" in name
            loads = 1 + (2 if formats == [16, 32] else 0 if formats == [32, 16] else 1)
            assert wide_loads == 2 * (loads + split), name  # two vectors a thread
            assert wide_stores == 2 * (1 + split), name
            if formats == [32, 16]:  # four 16-bit gradients: one 8-byte load
                assert sum(n for op, n in counts.items() if re.match(r"LDG.*\.64", op)) == 2, name
        elif "ada_update_kernel" in name:
            formats = [int(width) for width in re.findall(r"(?:BFloat|Float)(16|32)", name)[:2]]
            formats = formats if "S2_" not in name else formats[:1] * 2
            split = "RoundingE2" in name
            # Two rows at a time: of the parameter, of the gradient, of the low halves; and of
            # moments in fp32, where each element has its own.
            rows = formats[0] // 16 + split
            moments = 2 if "Lb0E" in name else 0
            assert wide_loads == 2 * (rows + formats[1] // 16 + moments), name
            assert wide_stores == 2 * (rows + moments), name
        elif re.search("ada_(stats|norm|sums)_kernel", name):
            per_row = (2 if "Float32" in name else 1) + (2 if "Lb0E" in name else 0)
            assert wide_loads == (4 if "stats" in name else 4 * per_row), name  # at a time
        elif "sumsq_chunk_kernel" in name:
            assert wide_loads == (16 if "Float32" in name else 8), name


# Part of a kernel's name -> instructions for an element on sm_90, at most, and elements a thread.
# On an H200 at the memory limit about 41 instructions for six bytes fill every issue slot.
ISSUED = {
    "lomo_update_kernelINS_8BFloat16ES2_LNS_8RoundingE0ELi1E": (18, 16),  # nearest
    "lomo_update_kernelINS_8BFloat16ES2_LNS_8RoundingE1ELi1E": (29, 16),  # stochastic
    "lomo_update_kernelINS_8BFloat16ES2_LNS_8RoundingE2ELi1E": (31, 16),  # split
    "lomo_update_kernelINS_7Float16ES2_LNS_8RoundingE0ELi1E": (18, 16),
    "lomo_update_kernelINS_7Float16ES2_LNS_8RoundingE1ELi1E": (38, 16),
    "lomo_update_kernelINS_7Float32ES2_LNS_8RoundingE0ELi1E": (23, 8),
    "sumsq_chunk_kernelINS_8BFloat16ELi1E": (6.5, 64),
    "ada_stats_kernelINS_8BFloat16ELb0ELi1E": (17, 32),
    "ada_stats_kernelINS_8BFloat16ELb1ELi1E": (19, 32),
}


@pytest.mark.parametrize("pattern", ISSUED)
def test_instructions_for_an_element(pattern, record_property):
    """Counted along the way on which nothing unusual happens."""
    limit, elements = ISSUED[pattern]
    ((name, (_, code, _)),) = [
        each for each in built_kernels("90").items() if re.search(pattern, each[0])
    ]
    through = [r"LDG.*\.128"] + ([r"STG.*\.128"] if "update" in name else [])
    count = sass.shortest(code, through)
    record_property("instructions for an element", f"{count / elements:.1f}")
    print(f"{name}: {count / elements:.1f} instructions for an element, at most {limit}")
    assert limit * 0.8 <= count / elements <= limit


def triton_kernels(*target):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)  # the package may be built in place, not installed
    result = subprocess.run(
        [sys.executable, ROOT / "python_tests/support/triton_machine_code.py", *target],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def expected(name):
    """Wide (loads, stores) of a Triton kernel: 8 elements a thread, 64 in a norm chunk; 64 of a
    product's tile (32 with fp32 factors), without the loads of the factors."""
    if name.startswith("product_update"):
        vectors = 16 if name.startswith("product_update-float32-of-b") else 8
        vectors += 8 if name.endswith("split") else 0
        return vectors, vectors
    if name.startswith("product_tiles"):
        return 0, 0
    words = 2 if "float32" in name else 1
    split = name.endswith("split")
    if name.startswith("ada_update"):  # eight elements of a row of a tile a thread
        return 2 * words + split, words + split
    if name.startswith("ada_norm"):
        return words, 0
    if name.startswith("ada_stats"):  # three rows of a tile on their way
        return 3 * words, 0
    if name.startswith("sumsq"):
        return 8 * words, 0
    return 2 * words + split, words + split


def check_product(name, counts, arch):
    """Tensor cores for 16-bit factors, which travel 16 bytes at a time into shared memory."""
    tensor_cores = "HGMMA" if arch == "90" else "HMMA"
    found = sum(n for op, n in counts.items() if re.match(rf"{tensor_cores}\.", op))
    assert (found > 0) == ("of-float32" not in name), name
    copies = {op for op in counts if op.startswith("LDGSTS")}
    assert copies, name
    assert all(op.endswith(".128") for op in copies), name
    limits = {"80": 163 << 10, "86": 99 << 10, "90": 227 << 10}
    assert counts["shared"] <= limits[arch], name


@pytest.mark.parametrize("arch", ["80", "86", "90"])
def test_triton_nvidia(arch):
    for name, counts in triton_kernels("cuda", arch).items():
        assert not forbidden(name, counts), name
        assert counts["stack"] == counts["local"] == 0, name
        if name.startswith("product_") and name != "product_sums":
            check_product(name, counts, arch)
            limit = MAX_REGISTERS_OF_PRODUCT
        else:
            # A tile in Triton takes more: what a warp adds up of it is spread by the compiler.
            limit = 160 if name.startswith("ada") else MAX_REGISTERS
        assert counts["registers"] <= limit, name
        wide = r"LDG\..*\.128" if name.startswith("product") else r"LDG.*\.128"
        loads = sum(n for op, n in counts.items() if re.match(wide, op))
        stores = sum(n for op, n in counts.items() if re.match(r"STG.*\.128", op))
        if name not in SCALARS:
            assert (loads, stores) == expected(name), name


def test_triton_amd():
    triton = pytest.importorskip("triton", reason="triton is not installed")

    old = triton.__version__ < "3.9"  # it has room for 16-bit sums of rows in NVIDIA's code alone
    for name, counts in triton_kernels("hip", "gfx942").items():
        if old and re.match("ada_stats-b?float16", name):
            continue
        assert counts["vgpr_spill_count"] == counts["sgpr_spill_count"] == 0, name
        if name in SCALARS:  # nothing is wide, and as above
            continue
        if not re.match("ada_(norm|update)", name):
            assert not [
                op for op in counts if re.match(r"v_(pk_)?fma|v_mad(?!_[iu])|scratch_", op)
            ], name
        loads = sum(n for op, n in counts.items() if op.endswith("load_dwordx4") and op[0] != "s")
        stores = sum(n for op, n in counts.items() if op.endswith("store_dwordx4"))
        if name.startswith("product"):
            assert any(op.startswith("v_mfma_f32") for op in counts), name
            assert counts["shared"] <= 64 << 10, name
            narrow = [op for op in counts if re.match("(global|buffer)_load_(u|s|d16)", op)]
            assert not narrow, name
            # of an update: twice as many threads as on NVIDIA share a tile
            assert stores == expected(name)[1] // 2, name
            continue
        # Beside the elements: 8 or 16 moments of columns that a thread holds.
        extra = loads - expected(name)[0] if name.startswith("ada") else 0
        assert 0 <= extra <= 2, name
        assert (loads - extra, stores) == expected(name), name
