"""Every kernel, on sizes and addresses around its edges, beside the reference on the CPU.

    python -m bench.touch

What a sanitizer should look at: tails of vectors, blocks and rows, misaligned views, tables of one,
a few and more tensors than one holds, batches, mixed dtypes, steps that are skipped.

Note [Inputs]: all of them are made on the CPU and copied. compute-sanitizer's initcheck looks at
our kernels alone, and would take for uninitialised what another kernel has written.
"""

import functools

import torch

from lomo_kernels import ops

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = ((F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32), (F16, F16), (F16, F32))
FEW = PAIRS[:2]  # for Triton, which compiles a kernel for each
SIZES = (1, 257, 40_001)
MANY = [1 + n % 9 for n in range(600)]  # tensors, more than a table holds
MATRICES = ((1, 1), (65, 257), (3, 65, 257), (777,))  # tiles have 64 rows and 256 columns
VECTORS = [(1 + n % 300,) for n in range(140)]  # more than a table holds of AdaLomo's
EXPERTS = [(1 + n % 70, 1 + n % 9) for n in range(140)]
SKIPPED = {"skip": 1.0}
OPTIONS = {"weight_decay": 0.1, "clip_value": 0.5}


def numbers(*shape, dtype=F32, shift=0):
    """shift: elements that the first is past an aligned address, on the device too."""
    base = torch.randn(shift + torch.Size(shape).numel()).to(dtype)
    return base[shift:].view(shape)


def moved(value, device, known):
    """Copies of tensors in lists, tuples and dicts. known: id of a tensor -> its copy; a tensor
    that comes twice is one there too."""
    if isinstance(value, (list, tuple)):
        return type(value)(moved(each, device, known) for each in value)
    if isinstance(value, dict):
        return {name: moved(each, device, known) for name, each in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) not in known:
        shift = value.storage_offset()
        room = torch.zeros(shift + value.numel(), dtype=value.dtype, device=device)
        known[id(value)] = room[shift:].view(value.shape).copy_(value)
    return known[id(value)]


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors(each)


def scalars(**changed):
    values = {"inv_scale": 0.5, "clip_coef": 0.7, "found_inf": 0.0, "skip": 0.0, **changed}
    return {name: torch.tensor([value]) for name, value in values.items()}


def check(device, backend, run, *values, close=None, **options):
    """Runs on the device and on the reference, and compares all that may have been written."""
    there, here = (moved((values, options), where, {}) for where in (device, "cpu"))
    run(*there[0], backend=backend, **there[1])
    here[1].pop("method", None)  # the reference has one
    run(*here[0], backend="reference", **here[1])
    found = tensors if close is None else rounded
    for a, b in zip(found(there), found(here)):
        if close is None:
            assert torch.equal(a.cpu(), b), f"{run.__name__} on {backend} is not the reference"
        else:
            torch.testing.assert_close(a.cpu(), b, rtol=close, atol=close)


def rounded(written):
    """Likewise, but of a split master its value: halves of values that are close need not be."""
    values, options = written
    if options.get("low") is None:
        return [*tensors(written)]
    bits = (values[0].view(torch.int16).to(torch.int32) << 16) + options["low"]
    return [bits.view(F32), *tensors(values[1:])]


def roundings(dtype):
    return [r for r in ops.ROUNDINGS if dtype is BF16 or (dtype is F16 and r != "split")
            or r == "nearest"]  # fmt: skip


def lows(params, rounding):
    if rounding != "split":
        return None
    return [torch.zeros(p.shape, dtype=torch.int16) for p in params]


def updates(check, pairs):
    for param, grad in pairs:
        for rounding in roundings(param):
            options = {"lr": 0.1, "rounding": rounding, **OPTIONS}
            for shift, skip in ((0, {}), (1, {}), (3, SKIPPED)):
                params = [numbers(n, dtype=param, shift=shift) for n in SIZES]
                grads = [numbers(n, dtype=grad, shift=2 * shift) for n in SIZES]
                grads[1][256] = torch.inf
                low = lows(params, rounding)
                check(ops.lomo_update_, params, grads, low=low, **options, **scalars(**skip))
                low = None if low is None else low[2]
                check(ops.lomo_update_, params[2], grads[2], low=low, **options, **scalars(**skip))
    params, grads = ([numbers(n, dtype=BF16) for n in MANY] for _ in range(2))
    check(ops.lomo_update_, params, grads, lr=0.1)


def norms(check, pairs):
    lists = [[numbers(n, dtype=d, shift=shift) for n in (*SIZES, 16_384)]
             for d in (F32, BF16, F16) for shift in (0, 1)]  # fmt: skip
    lists += [[numbers(n, dtype=(BF16, F32)[n % 2]) for n in MANY]]
    for grads in lists:
        known = scalars()
        check(
            ops.grad_sumsq_, torch.zeros(len(grads)), grads,
            inv_scale=known["inv_scale"], found_inf=known["found_inf"],
        )  # fmt: skip


def decisions(check, pairs):
    for count in (1, 255, 257, 1000):
        known = torch.zeros(len(ops.DECISIONS))
        known[ops.DECISIONS.index("grad_scale")] = 64.0
        check(ops.decide_, known, torch.rand(count), max_norm=1.0)


def adalomo(check, pairs):
    for param, grad in pairs:
        for rounding in roundings(param):
            for shapes in (*([shape] for shape in MATRICES), VECTORS, EXPERTS):
                skip = SKIPPED if shapes == [(65, 257)] and rounding == "nearest" else {}
                params = [numbers(*s, dtype=param, shift=len(s) - 1) for s in shapes]
                grads = [numbers(*s, dtype=grad, shift=len(s) - 1) for s in shapes]
                check(
                    ops.adalomo_update_, params, grads, [ops.adalomo_state(p) for p in params],
                    lr=0.1, rounding=rounding, low=lows(params, rounding), **OPTIONS,
                    **scalars(**skip),
                )  # fmt: skip
    for dtype in (F32, BF16, F16):
        check(sums, numbers(3, 65, 257, dtype=dtype), torch.zeros(12))


def sums(param, out, backend):
    ops.adalomo_sums_(param, out=out, backend=backend)


def product_updates(check, pairs):
    """Sums of products have another order than the reference's."""
    for param, factor in pairs:
        for rounding in roundings(param):
            close = 1e-4 if param is F32 or rounding == "split" else 2.0**-6
            for (rows, cols), tokens in (((130, 72), (100, 33)), ((24, 40), (1,)), ((7, 9), (5,))):
                factors = [tuple(numbers(n, width, dtype=factor) for width in (rows, cols))
                         for n in tokens]  # fmt: skip
                low = lows([torch.zeros(rows, cols)], rounding)
                check(
                    ops.product_update_, numbers(rows, cols, dtype=param), factors, lr=0.1,
                    rounding=rounding, method="epilogue", close=close, low=low and low[0],
                    **OPTIONS, **scalars(**(SKIPPED if rows == 24 else {})),
                )  # fmt: skip


def product_norms(check, pairs):
    for dtype, _ in pairs:
        right = numbers(300, 40, dtype=dtype)
        weights = [[(numbers(300, n, dtype=dtype), right)] for n in (24, 33)]
        weights.append([(numbers(n, 8, dtype=dtype), numbers(n, 12, dtype=dtype)) for n in (1, 7)])
        check(ops.product_sumsq_, *torch.zeros(2, 3), weights, close=1e-4)


RUNS = {
    "lomo_update": updates,
    "grad_sumsq": norms,
    "decide": decisions,
    "adalomo": adalomo,
    "product_update": product_updates,
    "product_sumsq": product_norms,
}


def runs(backend, device):
    """Those of the operations of which the backend has kernels."""
    module = ops.pick_backend(device, backend)
    return [RUNS[name] for name, function in ops.OPERATIONS.items()
            if hasattr(module, function.__name__)]  # fmt: skip


def backends(device):
    return [name for name in ("native", "triton") if ops.unavailable(name, device) is None]


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    for backend in backends(device):
        mine = functools.partial(check, device, backend)
        for run in runs(backend, device):
            run(mine, FEW if backend == "triton" else PAIRS)
            print(f"{run.__name__} of {backend} on {device}: as the reference", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
