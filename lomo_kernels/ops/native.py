"""Tensors to `_C`: addresses, sizes and codes. The only module that imports `_C`."""

from array import array
from operator import itemgetter

import torch

from .. import _C

_DTYPE = {getattr(torch, name): code for name, code in _C.dtypes.items()}
_ROUNDING = _C.roundings
NORM_CHUNK = _C.norm_chunk
# From a dict to a row of a list of tensors (csrc/kernels.h), and to the arguments of a function: by
# name, in the order that C++ has.
_ROW = {name: itemgetter(*fields) for name, fields in _C.structs.items()}
_ARGUMENTS = {name: itemgetter(*names) for name, names in _C.arguments.items()}
# Rows that every step fills are written in this order: by name each would cost a microsecond more.
_ORDER = {
    "TensorRef": ["param", "grad", "low", "numel", "offset", "param_id"],
    "GradRef": ["grad", "numel"],
}
if any(_C.structs[name] != fields for name, fields in _ORDER.items()):
    raise ImportError("lomo_kernels._C is of another version than the package: build it again")
_NO_ADDRESSES = dict.fromkeys(_C.structs["AdaRef"], 0)


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


def _call(name, device, arguments):
    """Runs a function on the CPU's threads, or on the device's current stream."""
    values = _ARGUMENTS[name](arguments)
    if device.type == "cpu":
        getattr(_C, "cpu_" + name)(*values, torch.get_num_threads())
        return
    where = device.index, torch.cuda.current_stream(device).cuda_stream
    tickets = _tickets(*where) if name == "grad_sumsq" else ()
    getattr(_C, "cuda_" + name)(*values, *tickets, *where)


def lomo_update_(
    params, grads, lows, offsets, param_ids, *, rounding, inv_scale, clip_coef, found_inf, skip,
    **numbers,
):  # fmt: skip
    rows = array("q")
    for param, grad, low, offset, param_id in zip(params, grads, lows, offsets, param_ids):
        rows.extend(
            (param.data_ptr(), grad.data_ptr(), _address(low), param.numel(), offset, param_id)
        )
    numbers |= {
        "rows": rows.buffer_info()[0], "count": len(params), "param": _DTYPE[params[0].dtype],
        "grad": _DTYPE[grads[0].dtype], "rounding": _ROUNDING[rounding],
        "inv_scale": _address(inv_scale), "clip_coef": _address(clip_coef),
        "found_inf": _address(found_inf), "skip": _address(skip),
    }  # fmt: skip
    _call("lomo_update", params[0].device, numbers)


# (device, stream) -> memory of csrc/kernels.h, Tickets, which calls on one stream may share.
_COUNTERS: dict[tuple, torch.Tensor] = {}


def _tickets(device, stream):
    """-> (counters, whether they are fresh). A captured graph has its own: it may run anywhere."""
    capturing = torch.cuda.is_current_stream_capturing()
    counters = None if capturing else _COUNTERS.get((device, stream))
    fresh = counters is None
    if fresh:
        counters = torch.empty(_C.tickets, dtype=torch.int32, device=device)
        if not capturing:
            _COUNTERS[device, stream] = counters
    return counters.data_ptr(), fresh


def grad_sumsq_(sumsq, grads, *, inv_scale, found_inf):
    rows = array("q")
    chunks = 0
    for grad in grads:
        numel = grad.numel()
        rows.extend((grad.data_ptr(), numel))
        chunks += max(1, -(-numel // NORM_CHUNK))
    partials = sumsq.new_empty(chunks) if chunks > len(grads) else None
    arguments = {
        "rows": rows.buffer_info()[0], "count": len(grads), "grad": _DTYPE[grads[0].dtype],
        "inv_scale": _address(inv_scale), "found_inf": _address(found_inf),
        "sumsq": sumsq.data_ptr(), "partials": _address(partials),
    }  # fmt: skip
    _call("grad_sumsq", sumsq.device, arguments)


def decide_(decisions, sumsq, found_inf, out, **numbers):
    arguments = {
        "decisions": decisions.data_ptr(), "out": _address(out), "sumsq": _address(sumsq),
        "count": _numel(sumsq), "found_inf": _address(found_inf), "flags": _numel(found_inf),
        **numbers,
    }  # fmt: skip
    _call("decide", decisions.device, arguments)


def _shape_of(tiles, numel):
    """Fields of an AdaRef, by name."""
    return {
        "batch": tiles.batch, "rows": tiles.rows, "cols": tiles.cols, "numel": numel,
        "factored": tiles.factored,
    }  # fmt: skip


def _row_of(item):
    """All fields of an AdaRef."""
    row = item.row if item.tiles.factored else item.full
    return {
        "param": item.param.data_ptr(), "grad": item.grad.data_ptr(), "low": _address(item.low),
        "row": _address(row), "col": _address(item.col), "step": item.step.data_ptr(),
        "sums": item.sums.data_ptr(), "param_id": item.param_id,
        **_shape_of(item.tiles, item.param.numel()),
    }  # fmt: skip


def adalomo_scratch(items):
    """Floats of scratch memory that `adalomo_update_` needs."""
    rows = array("q")
    for item in items:
        rows.extend(_ROW["AdaRef"](_NO_ADDRESSES | _shape_of(item.tiles, item.param.numel())))
    return _C.adalomo_scratch(rows.buffer_info()[0], len(items))


def adalomo_update_(items, *, weights, **options):
    rows = array("q")
    for item in items:
        rows.extend(_ROW["AdaRef"](_row_of(item)))
    scratch = weights.new_empty(_C.adalomo_scratch(rows.buffer_info()[0], len(items)))
    more = {"scratch": scratch.data_ptr()}
    _run_adalomo("adalomo_update", rows, items, weights, more, **options)


def _run_adalomo(
    name, rows, items, weights, more, *, eps, rounding, inv_scale, clip_coef, found_inf, skip,
    **numbers,
):  # fmt: skip
    arguments = {
        "rows": rows.buffer_info()[0], "count": len(items), "param": _DTYPE[items[0].param.dtype],
        "grad": _DTYPE[items[0].grad.dtype], "rounding": _ROUNDING[rounding],
        "eps_square": eps[0], "eps_rms": eps[1], "inv_scale": _address(inv_scale),
        "clip_coef": _address(clip_coef), "found_inf": _address(found_inf),
        "skip": _address(skip), "weights": weights.data_ptr(), "weights_count": len(weights),
        **numbers, **more,
    }  # fmt: skip
    _call(name, weights.device, arguments)


def _run_parts(call, rows, items, statistics, squares, *, weights, **options):
    more = {
        "call": _C.adalomo_calls[call], "statistics": statistics.data_ptr(),
        "squares": _address(squares),
    }  # fmt: skip
    _run_adalomo("adalomo_parts", rows, items, weights, more, **options)


def adalomo_memory(items):
    """Floats that each part keeps for the later calls, and that the first call needs beside."""
    sizes, most = [], 0
    for item in items:
        rows = item.part.shape[0] if item.part.joined else item.tiles.rows
        kept, passing = _C.adalomo_sizes(*item.tiles, rows)
        sizes.append(kept)
        most = max(most, passing)
    return sizes, most


def adalomo_statistics_(out, items, *, weights, **options):
    """Returns what the other calls get as `kept`: csrc/kernels.h, AdaPart, and their memory."""
    sizes, passing = adalomo_memory(items)
    kept, once = weights.new_empty(sum(sizes)), weights.new_empty(passing)
    rows, place = array("q"), kept.data_ptr()
    for item, size in zip(items, sizes):
        part = item.part
        row = _row_of(item) | {
            "kept": place, "passing": once.data_ptr(), "offset": part.offset,
            "whole_rows": part.shape[0] if part.joined else item.tiles.rows,
            "whole_numel": part.shape.numel(), "joined": part.joined, "slot": part.slot,
            "number": part.number,
        }  # fmt: skip
        rows.extend(_ROW["AdaPart"](row))
        place += 4 * size
    _run_parts("statistics", rows, items, out, None, weights=weights, **options)
    return rows, kept


def adalomo_squares_(out, items, kept, statistics, **options):
    _run_parts("squares", kept[0], items, statistics, out, **options)


def adalomo_parts_update_(items, kept, statistics, squares, **options):
    _run_parts("update", kept[0], items, statistics, squares, **options)


def adalomo_sums_(sums, param, tiles):
    shape = _shape_of(tiles, param.numel())
    addresses = {"param": param.data_ptr(), "sums": sums.data_ptr()}
    row = array("q", _ROW["AdaRef"](_NO_ADDRESSES | shape | addresses))
    arguments = {"row": row.buffer_info()[0], "param": _DTYPE[param.dtype]}
    _call("adalomo_sums", sums.device, arguments)
