"""Runs the C++ loops and the CUDA kernel bodies under AddressSanitizer and UBSan; no torch here.

Started by test_sanitizers.py with the sanitizers' runtime preloaded and the module's path as the
argument. Buffers are allocated to the byte, so that one element too far is an error; results of the
kernels and of the loops are compared.
"""

import ctypes
import importlib.util
import math
import random
import struct
import sys
from array import array

spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(C)

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
PAIRS = (
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
    ("float16", "float16"),
)
ROUNDED = {("bfloat16", "stochastic"), ("bfloat16", "split"), ("float16", "stochastic")}
OPTIONS = (0.01, 0.999, 0.5, 7, 2**63 + 3)  # lr, decay, clip_value, step, seed
SIZES = (0, 1, 3, 7, 8, 9, 16, 255, 2047, 2048, 2049, 2064, 5001)


class Buffer:
    def __init__(self, content, shift=0):
        self.start = libc.malloc(max(1, len(content) + shift))
        self.address = self.start + shift
        self.size = len(content)
        ctypes.memmove(self.address, content, self.size)

    def read(self):
        return ctypes.string_at(self.address, self.size)

    def __del__(self):
        libc.free(self.start)


def update(run, where, tensors, formats, rounding, options):
    """tensors: (p, g, low, numel, offset, id). Returns what is written."""
    found, inv, coef = (Buffer(struct.pack("f", x)) for x in (0.0, 1 / 512, 0.7))
    flat = [x for p, g, low, *rest in tensors for x in (p.address, g.address, low.address, *rest)]
    table = array("q", flat)
    codes = (C.dtypes[formats[0]], C.dtypes[formats[1]], C.roundings[rounding])
    scalars = (inv.address, coef.address, found.address, 0)
    run(table.buffer_info()[0], len(tensors), *codes, *options, *scalars, *where)
    return [p.read() + low.read() for p, _, low, *_ in tensors] + [found.read()]


COUNTERS = Buffer(b"\xff" * (4 * C.tickets))  # not set yet


def sumsq(run, where, grads, dtype):
    chunks = sum(max(1, -(-n // C.norm_chunk)) for _, n in grads)
    out, partials = Buffer(bytes(4 * len(grads))), Buffer(bytes(4 * chunks))
    found = Buffer(struct.pack("f", 0.0))
    table = array("q", [x for g, n in grads for x in (g.address, n)])
    run(
        table.buffer_info()[0],
        len(grads),
        C.dtypes[dtype],
        0,
        found.address,
        out.address,
        partials.address,
        *where,
    )
    return out.read(), found.read()


def buffers(data, shift, param, grad):
    return [
        (
            Buffer(p, shift * WIDTH[param]),
            Buffer(g, shift * WIDTH[grad] % 16),
            Buffer(low, 2 * shift),
            *rest,
        )
        for p, g, low, *rest in data
    ]


def check_update(param, grad, rounding, shift):
    data = [
        (
            random.randbytes(n * WIDTH[param]),
            random.randbytes(n * WIDTH[grad]),
            random.randbytes(2 * n),
            n,
            8 * k + (shift == 5),
            3 * k,
        )
        for k, n in enumerate(SIZES)
    ]

    def run(function, where, data):
        tensors = buffers(data, shift, param, grad)
        return update(function, where, tensors, (param, grad), rounding, OPTIONS)

    kernels = run(C.cuda_lomo_update, (0, 0), data)
    loops = run(C.cpu_lomo_update, (2,), data)
    one_by_one = [run(C.cuda_lomo_update, (0, 0), [tensor])[0] for tensor in data]
    assert same(kernels[:-1], one_by_one, param)
    assert same(kernels[:-1], loops[:-1], param)
    assert kernels[-1] == loops[-1]


def check_sumsq(dtype, shift):
    sizes = (*SIZES, C.norm_chunk - 1, C.norm_chunk, 2 * C.norm_chunk + 77)
    # 0x3f in every byte: finite in each of the three formats
    grads = [(Buffer(b"\x3f" * (n * WIDTH[dtype]), shift * WIDTH[dtype]), n) for n in sizes]
    loops = sumsq(C.cpu_grad_sumsq, (2,), grads, dtype)
    for fresh in (True, False):
        where = (COUNTERS.address, fresh, 0, 0)
        assert sumsq(C.cuda_grad_sumsq, where, grads, dtype) == loops
        assert not any(COUNTERS.read())


def adalomo(run, where, tensors, formats, rounding):
    """tensors: (p, g, low, row, col, step, sums, batch, rows, cols, numel, id, factored).
    Returns what is written."""
    found, inv, coef = (Buffer(struct.pack("f", x)) for x in (0.0, 1 / 512, 0.7))
    weights = Buffer(struct.pack("2f", 1.0, 0.6))
    pointers = [[b.address if isinstance(b, Buffer) else b for b in t] for t in tensors]
    table = array("q", [x for row in pointers for x in row])
    codes = (C.dtypes[formats[0]], C.dtypes[formats[1]], C.roundings[rounding])
    options = (0.01, 0.1, 1e-30, 1e-3, 1.0, 0.5, 2**63 + 3)
    scratch = Buffer(b"\xff" * (4 * C.adalomo_scratch(table.buffer_info()[0], len(tensors))))
    scalars = (inv.address, coef.address, found.address, 0, weights.address, 2, scratch.address)
    run(table.buffer_info()[0], len(tensors), *codes, *options, *scalars, *where)
    return [[b.read() for b in t[:7] if isinstance(b, Buffer)] for t in tensors] + [found.read()]


SHAPES = ((1, 1, 1), (1, 3, 5), (2, 64, 8), (1, 65, 257), (3, 0, 4), (0, 5, 7), (0,), (1,), (777,))


def check_adalomo(param, grad, rounding, shift):
    data = []
    for k, shape in enumerate(SHAPES):
        numel = shape[0] * (shape[1] * shape[2] if len(shape) == 3 else 1)
        factored = len(shape) == 3
        batch, rows, cols = shape if factored else (1, -(-numel // 256), 256)
        # Small numbers, finite in every format
        p, g = (bytes(random.choice((0, 0x3C)) for _ in range(n)) for n in
                (numel * WIDTH[param], numel * WIDTH[grad]))  # fmt: skip
        states = [bytes(4 * batch * n) for n in (rows, cols)] if factored else [bytes(4 * numel)]
        tiles = max(1, batch * -(-rows // 64) * -(-cols // 256))
        data.append((p, g, bytes(2 * numel), states, tiles, batch, rows, cols, numel, k,
                     int(factored)))  # fmt: skip

    def run(function, sums, where, several):
        tensors = []
        for p, g, low, states, tiles, *rest in data:
            state = [Buffer(s) for s in states] + [0] * (2 - len(states))
            t = [Buffer(p, shift * WIDTH[param]), Buffer(g, shift * WIDTH[grad] % 16),
                 Buffer(low, 2 * shift) if rounding == "split" else 0, *state, Buffer(bytes(4)),
                 Buffer(bytes(4 * tiles)), *rest]  # fmt: skip
            row = array("q", [b.address if isinstance(b, Buffer) else b for b in t])
            sums(row.buffer_info()[0], C.dtypes[param], *where)
            tensors.append(t)
        if several:
            return adalomo(function, where, tensors, (param, grad), rounding)
        return [adalomo(function, where, [t], (param, grad), rounding)[0] for t in tensors]

    kernels = run(C.cuda_adalomo_update, C.cuda_adalomo_sums, (0, 0), True)
    assert kernels == run(C.cpu_adalomo_update, C.cpu_adalomo_sums, (2,), True)
    assert kernels[:-1] == run(C.cuda_adalomo_update, C.cuda_adalomo_sums, (0, 0), False)
    assert all(k[-2] == struct.pack("i", 1) for k in kernels[:-1])  # the step was made


def floats(buffer):
    return struct.unpack(f"{buffer.size // 4}f", buffer.read())


def adalomo_parts(run, sums, where, shapes, ranks, formats, rounding, data):
    """Cuts the rows of each shape for the ranks. Returns what they write, messages included."""
    param, grad = formats
    weights, found = Buffer(struct.pack("2f", 1.0, 0.6)), Buffer(bytes(4))
    options = (0.01, 0.1, 1e-30, 1e-3, 1.0, 0.5, 2**63 + 3)
    scalars = (0, 0, found.address, 0, weights.address, 2)
    codes = (C.dtypes[param], C.dtypes[grad], C.roundings[rounding])
    tables, written, length = [array("q") for _ in range(ranks)], [], 0
    for k, shape in enumerate(shapes):
        row, factored = math.prod(shape[1:]), len(shape) > 1
        joined = len(shape) == 2 and math.prod(shape) > 0
        each = -(-shape[0] // ranks)
        for rank in range(ranks):
            begin, end = (min(x * each, shape[0]) for x in (rank, rank + 1))
            numel = (end - begin) * row
            batch, rows, cols = (1, -(-numel // 256), 256) if not factored else (
                (1, end - begin, row) if len(shape) == 2 else (end - begin, *shape[1:])
            )  # fmt: skip
            whole_rows = shape[0] if joined else rows
            kept, passing = C.adalomo_sizes(batch, rows, cols, factored, whole_rows)
            tiles = max(1, batch * -(-rows // 64) * -(-cols // 256))
            moments = [Buffer(bytes(4 * batch * n)) for n in (rows, cols)]
            buffers = [
                Buffer(data[k][0][begin * row * WIDTH[param] :][: numel * WIDTH[param]]),
                Buffer(data[k][1][begin * row * WIDTH[grad] :][: numel * WIDTH[grad]]),
                Buffer(bytes(2 * numel)),
                *(moments if factored else (Buffer(bytes(4 * numel)), Buffer(b""))),
                Buffer(bytes(4)),
                Buffer(bytes(4 * tiles)),
                Buffer(b"\xff" * (4 * kept)),
                Buffer(b"\xff" * (4 * passing)),
            ]
            own = array("q", [b.address for b in buffers[:7]])
            own.extend((batch, rows, cols, numel, k, factored))
            sums(own.buffer_info()[0], codes[0], *where)
            own.extend(
                (buffers[7].address, buffers[8].address, begin * row, whole_rows, math.prod(shape))
            )
            own.extend((joined, length, k))
            tables[rank].extend(own)
            written.append(buffers)
        length += 2 + row if joined else 1
    totals = [0, 0]
    messages = []
    for call, size in (("statistics", length), ("squares", len(shapes)), ("update", 0)):
        told = [Buffer(b"\xff" * (4 * size)) for _ in range(ranks)]
        for rank in range(ranks):
            more = [t.address if t else 0 for t in totals]
            if call != "update":
                more[("statistics", "squares").index(call)] = told[rank].address
            run(tables[rank].buffer_info()[0], len(shapes), *codes, *options, *scalars,
                C.adalomo_calls[call], *more, *where)  # fmt: skip
        messages += [t.read() for t in told]
        if call != "update":
            total = [sum(each) for each in zip(*map(floats, told))]
            totals[len(messages) > ranks] = Buffer(struct.pack(f"{size}f", *total))
    steps = {buffers[5].read() for buffers in written}
    assert steps == {struct.pack("i", 1)}  # every part was updated
    return [b.read() for buffers in written for b in buffers[:7]] + messages + [found.read()]


def check_adalomo_parts(param, grad, rounding):
    shapes = ((5, 9), (65, 260), (1, 300), (3, 0), (3, 65, 8), (777,), (2,), (0,))
    data = [
        [bytes(random.choice((0, 0x3C)) for _ in range(math.prod(s) * WIDTH[f])) for f in
         (param, grad)]
        for s in shapes
    ]  # fmt: skip
    for ranks in (1, 2, 4):
        arguments = (shapes, ranks, (param, grad), rounding, data)
        kernels = adalomo_parts(C.cuda_adalomo_parts, C.cuda_adalomo_sums, (0, 0), *arguments)
        loops = adalomo_parts(C.cpu_adalomo_parts, C.cpu_adalomo_sums, (2,), *arguments)
        assert kernels == loops


def check_decide(count, flags, found):
    start = struct.pack("8f", 1 / 64, 1, 0, 0, 0, 64, 2, 0)
    written = []
    for run, where in ((C.cuda_decide, (0, 0)), (C.cpu_decide, (2,))):
        decisions, out = Buffer(start), Buffer(bytes(32))
        sums = Buffer(b"\x3f" * (4 * count))
        others = Buffer(struct.pack(f"{flags}f", *[found] * flags))
        factors = (0.5, 1.0, 2.0, 0.5, 3)  # max_norm, min_scale, growth, backoff, interval
        pointers = (sums.address if count else 0, count, others.address if flags else 0, flags)
        run(decisions.address, out.address, *pointers, *factors, *where)
        written.append((decisions.read(), out.read()))
    assert written[0] == written[1]


def main():
    random.seed(0)
    cases = [
        (param, grad, rounding)
        for param, grad in PAIRS
        for rounding in ("nearest", "stochastic", "split")
        if rounding == "nearest" or (param, rounding) in ROUNDED
    ]
    for case in cases:
        for shift in (0, 1, 5):
            check_update(*case, shift)
    for case in cases:
        for shift in (0, 3):
            check_adalomo(*case, shift)
        check_adalomo_parts(*case)
    for dtype in WIDTH:
        for shift in (0, 3):
            check_sumsq(dtype, shift)
    for count in (0, 1, 255, 256, 257, 1000):
        for flags in (0, 1, 5):
            check_decide(count, flags, float(count % 2))
    print(f"{8 * len(cases) + 2 * len(WIDTH)} lists of tensors, no error")
    if "--overrun" in sys.argv:  # proves that an overrun would have been seen
        short = Buffer(bytes(2 * 100))
        tensor = (short, Buffer(bytes(256)), short, 128, 0, 0)
        formats = ("bfloat16", "bfloat16")
        update(C.cuda_lomo_update, (0, 0), [tensor], formats, "nearest", OPTIONS)


def same(a, b, dtype):
    """Bytes are equal, but that the payload of a NaN may differ."""
    if a == b:
        return True
    code, nan = ("I", 0x7F800000) if WIDTH[dtype] == 4 else ("H", 0x7F80)
    nan = 0x7C00 if dtype == "float16" else nan
    for x, y in zip(a, b):
        count = len(x) // (WIDTH[dtype] + 2)
        xs, ys = (struct.unpack(f"{count}{code}", z[: count * WIDTH[dtype]]) for z in (x, y))
        top = 0x7FFFFFFF if WIDTH[dtype] == 4 else 0x7FFF
        if any(p != q and not ((p & top) > nan and (q & top) > nan) for p, q in zip(xs, ys)):
            return False
        if x[count * WIDTH[dtype] :] != y[count * WIDTH[dtype] :]:
            return False
    return True


main()
