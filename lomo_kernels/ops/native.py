"""Tensors to `_C`: addresses, sizes and codes. The only module that imports `_C`."""

from array import array

import torch

from .. import _C

_DTYPE = {getattr(torch, name): code for name, code in _C.dtypes.items()}
_ROUNDING = _C.roundings
NORM_CHUNK = _C.norm_chunk


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
    """The trailing arguments of a call: threads on the CPU, device and stream on CUDA."""
    if device.type == "cpu":
        return (torch.get_num_threads(),)
    return device.index, torch.cuda.current_stream(device).cuda_stream


def lomo_update_(
    params, grads, lows, offsets, param_ids, *, lr, decay, clip_value, step, seed, rounding,
    inv_scale, clip_coef, found_inf, skip,
):  # fmt: skip
    rows = array("q")
    for param, grad, low, offset, param_id in zip(params, grads, lows, offsets, param_ids):
        rows.extend(
            (param.data_ptr(), grad.data_ptr(), _address(low), param.numel(), offset, param_id)
        )
    device = params[0].device
    run = _C.cpu_update if device.type == "cpu" else _C.cuda_update
    run(
        rows.buffer_info()[0], len(params), _DTYPE[params[0].dtype], _DTYPE[grads[0].dtype],
        _ROUNDING[rounding], lr, decay, clip_value, step, seed,
        _address(inv_scale), _address(clip_coef), _address(found_inf), _address(skip),
        *_where(device),
    )  # fmt: skip


def grad_sumsq_(sumsq, grads, *, inv_scale, found_inf):
    rows = array("q")
    chunks = 0
    for grad in grads:
        rows.extend((grad.data_ptr(), grad.numel()))
        chunks += max(1, -(-grad.numel() // NORM_CHUNK))
    device = sumsq.device
    partials = sumsq.new_empty(chunks) if chunks > len(grads) else None
    run = _C.cpu_sumsq if device.type == "cpu" else _C.cuda_sumsq
    run(
        rows.buffer_info()[0], len(grads), _DTYPE[grads[0].dtype],
        _address(inv_scale), _address(found_inf), sumsq.data_ptr(), _address(partials),
        *_where(device),
    )  # fmt: skip


def decide_(
    decisions, sumsq, found_inf, out, *, max_norm, min_scale, growth_factor, backoff_factor,
    growth_interval,
):  # fmt: skip
    device = decisions.device
    run, where = (_C.cpu_decide, ()) if device.type == "cpu" else (_C.cuda_decide, _where(device))
    run(
        decisions.data_ptr(), _address(out), _address(sumsq), _numel(sumsq), _address(found_inf),
        _numel(found_inf), max_norm, min_scale, growth_factor, backoff_factor, growth_interval,
        *where,
    )  # fmt: skip


def _row_of(item, scratch):
    """csrc/kernels.h, AdaRef"""
    tiles, row = item.tiles, item.row if item.tiles.factored else item.full
    return (
        item.param.data_ptr(), item.grad.data_ptr(), _address(item.low), _address(row),
        _address(item.col), item.step.data_ptr(), item.sums.data_ptr(), scratch,
        tiles.batch, tiles.rows, tiles.cols, item.param.numel(), item.param_id, tiles.factored,
    )  # fmt: skip


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
        rows.extend(_row_of(item, scratch.data_ptr() if factored else place))
        place += 0 if factored else 4 * size
    run = _C.cpu_adalomo if weights.device.type == "cpu" else _C.cuda_adalomo
    _run_adalomo(run, rows, items, (), weights, **options)


def _run_adalomo(
    run, rows, items, more, weights, *, lr, weight_decay, eps, clip_threshold, clip_value, seed,
    rounding, inv_scale, clip_coef, found_inf, skip,
):  # fmt: skip
    run(
        rows.buffer_info()[0], len(items), _DTYPE[items[0].param.dtype],
        _DTYPE[items[0].grad.dtype], _ROUNDING[rounding], lr, weight_decay, *eps, clip_threshold,
        clip_value, seed, _address(inv_scale), _address(clip_coef), _address(found_inf),
        _address(skip), weights.data_ptr(), len(weights), *more, *_where(weights.device),
    )  # fmt: skip


def _parts_call(call, rows, items, statistics, squares, *, weights, **options):
    run = _C.cpu_adalomo_parts if weights.device.type == "cpu" else _C.cuda_adalomo_parts
    more = (_C.adalomo_calls[call], statistics.data_ptr(), _address(squares))
    _run_adalomo(run, rows, items, more, weights, **options)


def adalomo_statistics_(out, items, *, weights, **options):
    """Returns what the other calls get as `kept`: csrc/kernels.h, AdaPart, and their memory."""
    sizes, passing = [], 0
    for item in items:
        tiles, whole = item.tiles, item.tiles.rows
        passing = max(passing, _C.adalomo_scratch(*tiles) - _C.adalomo_kept(*tiles, whole))
        sizes.append(_C.adalomo_kept(*tiles, item.part.shape[0] if item.part.joined else whole))
    kept, once = weights.new_empty(sum(sizes)), weights.new_empty(passing)
    rows, place = array("q"), kept.data_ptr()
    for item, size in zip(items, sizes):
        part = item.part
        rows.extend(_row_of(item, place))
        rows.extend(
            (once.data_ptr(), part.offset, part.shape[0] if part.joined else item.tiles.rows,
             part.shape.numel(), part.joined, part.slot, part.number)
        )  # fmt: skip
        place += 4 * size
    _parts_call("statistics", rows, items, out, None, weights=weights, **options)
    return rows, kept


def adalomo_squares_(out, items, kept, statistics, **options):
    _parts_call("squares", kept[0], items, statistics, out, **options)


def adalomo_parts_update_(items, kept, statistics, squares, **options):
    _parts_call("update", kept[0], items, statistics, squares, **options)


def adalomo_sums_(sums, param, tiles):
    row = array("q", [0] * 14)
    row[0], row[6] = param.data_ptr(), sums.data_ptr()
    row[8:12] = array("q", [tiles.batch, tiles.rows, tiles.cols, param.numel()])
    run = _C.cpu_adalomo_sums if sums.device.type == "cpu" else _C.cuda_adalomo_sums
    run(row.buffer_info()[0], _DTYPE[param.dtype], *_where(sums.device))
