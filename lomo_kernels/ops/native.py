"""Tensors to `_C`: addresses, sizes and codes. The only module that imports `_C`."""

from array import array
from collections import namedtuple

import torch

from .. import _C

_DTYPE = {getattr(torch, name): code for name, code in _C.dtypes.items()}
_ROUNDING = _C.roundings
NORM_CHUNK = _C.norm_chunk
# Rows of lists of tensors, filled by name: the order of their fields is C++'s (csrc/kernels.h).
TensorRef, GradRef, AdaRef, AdaPart = (
    namedtuple(name, _C.structs[name]) for name in ("TensorRef", "GradRef", "AdaRef", "AdaPart")
)


def build_info():
    """What the extension module was compiled with, for `lomo-kernels doctor`."""
    info = {
        "compiler": _C.compiler,
        "cpu instruction set": _C.cpu_instruction_set(),
        "cuda compiler": _C.cuda_compiler or "none: built without CUDA",
        "cuda architectures": _C.cuda_architectures or "none",
    }
    if _C.cuda_architectures:
        try:
            info["cuda devices"] = str(_C.cuda_device_count())
        except RuntimeError as error:
            info["cuda devices"] = f"none: {error}"
    return info


def unavailable(device):
    """Why this backend cannot run on `device`; None: it can."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there are no C++ kernels for {device.type}"
    if torch.version.hip:
        return "the C++ kernels are CUDA; on AMD the triton backend runs"
    if not _C.cuda_architectures:
        return "built without CUDA (LOMO_CUDA=ON and nvcc on PATH or CUDA_HOME build it)"
    return _C.cuda_unavailable(device.index or 0)


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _numel(tensor):
    return 0 if tensor is None else tensor.numel()


def _where(device):
    """The arguments that say where a call runs: threads on the CPU, device and stream on CUDA."""
    if device.type == "cpu":
        return {"threads": torch.get_num_threads()}
    return {"device": device.index, "stream": torch.cuda.current_stream(device).cuda_stream}


def lomo_update_(
    params, grads, lows, offsets, param_ids, *, rounding, inv_scale, clip_coef, found_inf, skip,
    **numbers,
):  # fmt: skip
    rows = array("q")
    for param, grad, low, offset, param_id in zip(params, grads, lows, offsets, param_ids):
        rows.extend(
            TensorRef(
                param=param.data_ptr(), grad=grad.data_ptr(), low=_address(low),
                numel=param.numel(), offset=offset, param_id=param_id,
            )
        )  # fmt: skip
    device = params[0].device
    run = _C.cpu_lomo_update if device.type == "cpu" else _C.cuda_lomo_update
    run(
        rows=rows.buffer_info()[0], count=len(params), param=_DTYPE[params[0].dtype],
        grad=_DTYPE[grads[0].dtype], rounding=_ROUNDING[rounding], inv_scale=_address(inv_scale),
        clip_coef=_address(clip_coef), found_inf=_address(found_inf), skip=_address(skip),
        **numbers, **_where(device),
    )  # fmt: skip


def grad_sumsq_(sumsq, grads, *, inv_scale, found_inf):
    rows = array("q")
    chunks = 0
    for grad in grads:
        rows.extend(GradRef(grad=grad.data_ptr(), numel=grad.numel()))
        chunks += max(1, -(-grad.numel() // NORM_CHUNK))
    device = sumsq.device
    partials = sumsq.new_empty(chunks) if chunks > len(grads) else None
    run = _C.cpu_grad_sumsq if device.type == "cpu" else _C.cuda_grad_sumsq
    run(
        rows=rows.buffer_info()[0], count=len(grads), grad=_DTYPE[grads[0].dtype],
        inv_scale=_address(inv_scale), found_inf=_address(found_inf), sumsq=sumsq.data_ptr(),
        partials=_address(partials), **_where(device),
    )  # fmt: skip


def decide_(decisions, sumsq, found_inf, out, **numbers):
    device = decisions.device
    run, where = (_C.cpu_decide, {}) if device.type == "cpu" else (_C.cuda_decide, _where(device))
    run(
        decisions=decisions.data_ptr(), out=_address(out), sumsq=_address(sumsq),
        count=_numel(sumsq), found_inf=_address(found_inf), flags=_numel(found_inf), **numbers,
        **where,
    )  # fmt: skip


def _row_of(item, scratch):
    """The fields of an AdaRef, by name."""
    tiles, row = item.tiles, item.row if item.tiles.factored else item.full
    return {
        "param": item.param.data_ptr(), "grad": item.grad.data_ptr(), "low": _address(item.low),
        "row": _address(row), "col": _address(item.col), "step": item.step.data_ptr(),
        "sums": item.sums.data_ptr(), "scratch": scratch, "batch": tiles.batch, "rows": tiles.rows,
        "cols": tiles.cols, "numel": item.param.numel(), "param_id": item.param_id,
        "factored": tiles.factored,
    }  # fmt: skip


def adalomo_scratch(tiles):
    """Floats of scratch memory: of each tensor, shared by all matrices, of the others together."""
    sizes = [_C.adalomo_scratch(*each) for each in tiles]
    # Matrices run one after the other.
    shared = max((s for s, each in zip(sizes, tiles) if each.factored), default=0)
    return sizes, shared, sum(s for s, each in zip(sizes, tiles) if not each.factored)


def adalomo_update_(items, *, weights, **options):
    sizes, shared, own = adalomo_scratch([item.tiles for item in items])
    scratch = weights.new_empty(shared + own)
    rows, place = array("q"), scratch.data_ptr() + 4 * shared
    for item, size in zip(items, sizes):
        factored = item.tiles.factored
        rows.extend(AdaRef(**_row_of(item, scratch.data_ptr() if factored else place)))
        place += 0 if factored else 4 * size
    _run_adalomo("adalomo_update", rows, items, weights, **options)


def _run_adalomo(
    name, rows, items, weights, *, eps, rounding, inv_scale, clip_coef, found_inf, skip, **others
):
    device = weights.device
    run = getattr(_C, f"{device.type}_{name}")
    run(
        rows=rows.buffer_info()[0], count=len(items), param=_DTYPE[items[0].param.dtype],
        grad=_DTYPE[items[0].grad.dtype], rounding=_ROUNDING[rounding], eps_square=eps[0],
        eps_rms=eps[1], inv_scale=_address(inv_scale), clip_coef=_address(clip_coef),
        found_inf=_address(found_inf), skip=_address(skip), weights=weights.data_ptr(),
        weights_count=len(weights), **others, **_where(device),
    )  # fmt: skip


def _run_parts(call, rows, items, statistics, squares, *, weights, **options):
    _run_adalomo(
        "adalomo_parts", rows, items, weights, call=_C.adalomo_calls[call],
        statistics=statistics.data_ptr(), squares=_address(squares), **options,
    )  # fmt: skip


def adalomo_memory(items):
    """Floats that each part keeps for the later calls, and that the first call needs beside."""
    sizes, passing = [], 0
    for item in items:
        tiles, whole = item.tiles, item.tiles.rows
        passing = max(passing, _C.adalomo_scratch(*tiles) - _C.adalomo_kept(*tiles, whole))
        sizes.append(_C.adalomo_kept(*tiles, item.part.shape[0] if item.part.joined else whole))
    return sizes, passing


def adalomo_statistics_(out, items, *, weights, **options):
    """Returns what the other calls get as `kept`: csrc/kernels.h, AdaPart, and their memory."""
    sizes, passing = adalomo_memory(items)
    kept, once = weights.new_empty(sum(sizes)), weights.new_empty(passing)
    rows, place = array("q"), kept.data_ptr()
    for item, size in zip(items, sizes):
        part = item.part
        rows.extend(
            AdaPart(
                **_row_of(item, place), passing=once.data_ptr(), offset=part.offset,
                whole_rows=part.shape[0] if part.joined else item.tiles.rows,
                whole_numel=part.shape.numel(), joined=part.joined, slot=part.slot,
                number=part.number,
            )
        )  # fmt: skip
        place += 4 * size
    _run_parts("statistics", rows, items, out, None, weights=weights, **options)
    return rows, kept


def adalomo_squares_(out, items, kept, statistics, **options):
    _run_parts("squares", kept[0], items, statistics, out, **options)


def adalomo_parts_update_(items, kept, statistics, squares, **options):
    _run_parts("update", kept[0], items, statistics, squares, **options)


def adalomo_sums_(sums, param, tiles):
    row = dict.fromkeys(AdaRef._fields, 0)
    row |= {"param": param.data_ptr(), "sums": sums.data_ptr(), "numel": param.numel()}
    row |= {"batch": tiles.batch, "rows": tiles.rows, "cols": tiles.cols}
    row = array("q", AdaRef(**row))
    run = _C.cpu_adalomo_sums if sums.device.type == "cpu" else _C.cuda_adalomo_sums
    run(row=row.buffer_info()[0], param=_DTYPE[param.dtype], **_where(sums.device))
