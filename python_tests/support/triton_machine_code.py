"""Compiles the Triton kernels for GPUs that are not here and prints what the machine code holds.

Started by test_machine_code.py in a process without TRITON_INTERPRET. Arguments: cuda CC, or
hip ARCH. Prints one JSON object: case -> counts of instructions and resources.
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lomo_kernels import ops
from lomo_kernels.ops import reference
from lomo_kernels.ops.triton import (
    adalomo,
    common,
    decide,
    grad_sumsq,
    lomo_update,
    product_sumsq,
    product_update,
)

# Bytes of shared memory that a block can have.
SHARED = {"80": 163 << 10, "86": 99 << 10, "90": 227 << 10, "gfx942": 64 << 10}
SCALARS = {
    "n": "i64", "offset": "i64", "param_id": "i32", "lr": "fp32", "decay": "fp32",
    "clip_value": "fp32", "step": "i32", "seed": "i64", "inv_scale_ptr": "*fp32",
    "clip_coef_ptr": "*fp32", "found_inf_ptr": "*fp32", "skip_ptr": "*fp32", "rows_ptr": "*i64",
    "d_ptr": "*fp32", "sumsq_ptr": "*fp32", "found_ptr": "*fp32", "count": "i32", "flags": "i32",
    "max_norm": "fp32", "min_scale": "fp32",
    **dict.fromkeys(
        ("row_ptr", "col_ptr", "new_row_ptr", "new_col_ptr", "means_ptr", "norms_ptr", "sums_ptr",
         "scalars_ptr", "weights_ptr", "row_parts_ptr", "col_parts_ptr"), "*fp32",
    ),
    "step_ptr": "*i32", "weights_count": "i32", "rows": "i32", "cols": "i32", "numel": "i64",
    "down": "i32", "across": "i32", "groups": "i32", "whole_rows": "i32", "eps": "fp32",
    "shrink": "fp32",
    "tokens": "i32", "ld_left": "i32", "ld_right": "i32", "more_ptr": "*i64", "more": "i32",
    "group_of_program_ptr": "*i32", "groups_ptr": "*i64", "uses_ptr": "*i64",
    "magnitude_ptr": "*fp32",
    "tensor_of_block_ptr": "*i64", "partials_ptr": "*fp32", "out_ptr": "*fp32", "low_ptr": "*i16",
}  # fmt: skip


def pointer(dtype):
    return "*i32" if dtype == "float32" else "*i16"


def compile_kernel(kernel, target, types, num_warps, num_stages=None, **constants):
    names = kernel.arg_names
    types = {**SCALARS, **types}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    # what the launcher finds out at run time: aligned pointers, and sizes that are multiples of 16
    aligned = [
        name
        for name in names
        if name in ("n", "rows", "cols", "numel", "ld_left", "ld_right")
        or (signature[name].startswith("*") and name != "partials_ptr")
    ]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, **common.EXACT}
    if num_stages is not None:
        options["num_stages"] = num_stages
    return triton.compile(source, target=target, options=options)


def of_lomo_update(target):
    for param, grad, rounding in (
        ("bfloat16", "bfloat16", "nearest"), ("bfloat16", "bfloat16", "stochastic"),
        ("bfloat16", "bfloat16", "split"), ("float16", "float16", "nearest"),
        ("float16", "float16", "stochastic"), ("float32", "float32", "nearest"),
    ):  # fmt: skip
        constants = {
            "P": param, "G": grad, "ROUNDING": rounding, "GROUPED": True, "SIZE": lomo_update.BLOCK,
        }  # fmt: skip
        types = {"p_ptr": pointer(param), "g_ptr": pointer(grad)}
        low = {} if rounding == "split" else {"low_ptr": None}
        warps = 4 if target.backend == "cuda" else 2
        yield (
            f"update-{param}-{rounding}",
            compile_kernel(
                lomo_update.lomo_update_kernel, target, types, warps, **constants, **low
            ),
        )
        if param == "bfloat16":
            yield f"list-{param}-{rounding}", compile_kernel(
                lomo_update.lomo_update_list_kernel, target, types, warps, **constants,
                ALIGNED=True, P_INT=triton.language.int16, G_INT=triton.language.int16,
            )  # fmt: skip


def of_grad_sumsq(target):
    for dtype in ("bfloat16", "float16", "float32"):
        yield f"sumsq-{dtype}", compile_kernel(
            grad_sumsq.sumsq_chunk_kernel, target, {"g_ptr": pointer(dtype)},
            8 if target.backend == "cuda" else 4, G=dtype, LEVELS=11,
            ROWS=reference.NORM_CHUNK // reference.NORM_LANES,
        )  # fmt: skip


def of_adalomo(target):
    for dtype, roundings in (
        ("bfloat16", ("nearest", "stochastic", "split")), ("float16", ("stochastic",)),
        ("float32", ("nearest",)),
    ):  # fmt: skip
        types, warps = {"g_ptr": pointer(dtype)}, 8 if target.backend == "cuda" else 4
        yield (
            f"ada_stats-{dtype}",
            compile_kernel(adalomo.ada_stats_kernel, target, types, warps, G=dtype),
        )
        yield (
            f"ada_norm-{dtype}",
            compile_kernel(adalomo.ada_norm_kernel, target, types, warps, G=dtype, FACTORED=True),
        )
        for rounding in roundings:
            low = {} if rounding == "split" else {"low_ptr": None}
            yield f"ada_update-{dtype}-{rounding}", compile_kernel(
                adalomo.ada_update_kernel, target, types | {"p_ptr": pointer(dtype)}, warps,
                P=dtype, G=dtype, ROUNDING=rounding, GROUPED=True, FACTORED=True, **low,
            )  # fmt: skip


def of_decide(target):
    yield "decide", compile_kernel(
        decide.decide_kernel, target, {}, 4, CLIP=True, GROWTH=2.0, BACKOFF=0.5, INTERVAL=2000,
        LEVELS=8,
    )  # fmt: skip


def of_product_update(target):
    for param, factor, rounding, more in (
        ("bfloat16", "bfloat16", "nearest", 0), ("bfloat16", "bfloat16", "stochastic", 1),
        ("bfloat16", "bfloat16", "split", 1), ("float16", "float16", "stochastic", 0),
        ("float32", "bfloat16", "nearest", 0), ("float32", "float32", "nearest", 0),
    ):  # fmt: skip
        shape = product_update.configuration(
            getattr(torch, factor), SHARED[str(target.arch)], target.backend == "hip"
        )
        factor_pointer = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[factor]
        none = {"low_ptr": None} if rounding != "split" else {}
        none |= {} if more else {"more_ptr": None}
        yield f"product_update-{param}-of-{factor}-{rounding}", compile_kernel(
            product_update.product_update_kernel, target,
            {"p_ptr": pointer(param), **dict.fromkeys(("left_ptr", "right_ptr"), factor_pointer)},
            P=param, FACTOR=common.type_of(getattr(torch, factor)), ROUNDING=rounding,
            GROUPED=True, ALIGNED=True, **shape, **none,
        )  # fmt: skip


def of_product_sumsq(target):
    for factor in ("bfloat16", "float16", "float32"):
        dtype = getattr(torch, factor)
        shape = product_sumsq.configuration(
            dtype, SHARED[str(target.arch)], target.backend == "hip"
        )
        yield f"product_tiles-of-{factor}", compile_kernel(
            product_sumsq.product_tiles_kernel, target,
            {"weights_ptr": "*i64", "partials_ptr": "*fp64"}, FACTOR=common.type_of(dtype),
            ALIGNED=True, **shape,
        )  # fmt: skip
    types = {"sums_ptr": "*i64", "partials_ptr": "*fp64"}
    yield (
        "product_sums",
        compile_kernel(product_sumsq.product_sums_kernel, target, types, 4, LANES=256),
    )


def cases(target):
    for name in ops.OPERATIONS:
        yield from globals()[f"of_{name}"](target)


def nvidia(compiled):
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = [tools / "cuobjdump", "-sass", "-res-usage", file.name]
        text = subprocess.run(
            dump, capture_output=True, text=True, check=True, env={"PATH": str(tools)}
        ).stdout
    pattern = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
    counts = dict(collections.Counter(re.findall(pattern, text)))
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    counts |= dict(zip(("registers", "stack", "local"), map(int, resources.groups())))
    counts["shared"] = compiled.metadata.shared
    return counts


def amd(compiled):
    text = compiled.asm["amdgcn"]
    counts = dict(collections.Counter(re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)))
    counts["shared"] = compiled.metadata.shared
    for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count"):
        counts[name] = int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
    return counts


def main():
    backend, arch = sys.argv[1:]
    target = GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)
    read = nvidia if backend == "cuda" else amd
    print(json.dumps({name: read(compiled) for name, compiled in cases(target)}))


main()
