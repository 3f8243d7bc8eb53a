"""What an optimizer costs the host: hooks, checks and launches, for models of many tensors.

    python -m bench.bench_host [--minutes 8] [--largest N]

The tensors are tiny and one function hands all their gradients to autograd, so that little else
takes time. `per_tensor_us` is a step's time beyond that of backward alone; on a GPU the time until
the call returns. 291 and 723 tensors are LLaMA-7B's and -65B's, 18,000 those of a mixture of
experts.

Note [Launches]: on a GPU the kernels that the profiler sees in a step beyond backward's; on the
CPU, and where the profiler sees none, torch's operators and calls of our kernels. `host_reads` are
the operators that bring a value to the host. On a GPU a step of ours also runs with torch's check
for synchronizations set to raise.
"""

import contextlib
import functools
import random
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lomo_kernels import AdaLomo, Lomo, ops

from . import peers, record, suite, timing
from .device import no_waits

COUNTS = (291, 723, 2000, 18_000)
SQUARED = 2000  # tensors from which one backward of lomo-optim would take minutes
SIDE = 4


class Feed(torch.autograd.Function):
    """A loss whose backward hands every parameter its gradient."""

    @staticmethod
    def forward(ctx, grads, *params):
        ctx.grads = grads
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return None, *ctx.grads


class Model:
    """Parameters, and what backward does to them."""

    def __init__(self, count, device):
        tensors = torch.randn(count, SIDE, SIDE, device=device).mul_(0.02).unbind()
        self.held = peers.Holder([t.clone() for t in tensors])
        self.params = list(self.held.parameters())
        self.grads = [torch.full_like(p, 1e-3) for p in self.params]

    def loss(self):
        return Feed.apply(self.grads, *self.params)

    def drop(self):
        for p in self.params:
            p.grad = None


def backward_alone(model):
    """Gradients are dropped outside the time."""
    return lambda: model.loss().backward()


def ours(model, kind=Lomo, **options):
    optimizer = kind(model.held, lr=1e-3, **options)
    return lambda: optimizer.backward(model.loss())


def lomo_optim(model, norm=None):
    if len(model.params) > SQUARED:
        raise RuntimeError(f"not run: each of {len(model.params)} hooks looks at all of them")
    _, step = peers.lomo_optim_step(model.held, lr=1e-3, norm=norm)
    return lambda: step(model.loss())


def optimi_release(model):
    _, step = peers.optimi_released(model.held, lr=1e-3)
    return lambda: step(model.loss())


def foreach_sgd(model):
    """Gradients wait for it, all of them."""
    optimizer = torch.optim.SGD(model.params, lr=1e-3, foreach=True)

    def step():
        model.loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# Nothing of the model is seen, so that "auto" would run backward twice.
CLIPPED = {"clip_grad_norm": 1.0, "strategy": "one_backward"}
RIVALS = {
    ("backward alone", ""): backward_alone,
    ("Lomo", ""): ours,
    ("Lomo", "clip_grad_norm"): functools.partial(ours, **CLIPPED),
    ("Lomo", "clip_grad_norm, two_backward"): functools.partial(
        ours, clip_grad_norm=1.0, strategy="two_backward"
    ),
    ("AdaLomo", ""): functools.partial(ours, kind=AdaLomo),
    ("lomo-optim", ""): lomo_optim,
    ("lomo-optim", "clip_grad_norm"): functools.partial(lomo_optim, norm=1.0),
    ("optimi", "gradient release"): optimi_release,
    ("torch SGD", "foreach"): foreach_sgd,
}


class Counter(TorchDispatchMode):
    """Operators that compute, and those that bring a value to the host."""

    def __init__(self):
        super().__init__()
        self.launches = self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        view = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        if function is torch.ops.aten._local_scalar_dense.default:
            self.reads += 1
        elif not view and "empty" not in function.__name__:
            self.launches += 1
        return found


KERNELS = (*(function.__name__ for function in ops.OPERATIONS.values()), "adalomo_sums_")


@contextlib.contextmanager
def counting_calls(device, counter):
    """Counts what our backend runs, which torch does not see."""
    backend = ops.pick_backend(device)
    real = {name: getattr(backend, name) for name in KERNELS if hasattr(backend, name)}

    def counted(function):
        def call(*args, **kwargs):
            counter.launches += 1
            return function(*args, **kwargs)

        return call

    try:
        for name, function in real.items():
            setattr(backend, name, counted(function))
        yield
    finally:
        for name, function in real.items():
            setattr(backend, name, function)


def counts(where, step):
    """-> (launches, host reads) of a step; Note [Launches]."""
    with Counter() as counter, counting_calls(where.device, counter):
        step()
    activity = torch.profiler.ProfilerActivity.CUDA
    if not where.gpu or activity not in torch.profiler.supported_activities():
        return counter.launches, counter.reads
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    kernels = [e for e in profile.events() if e.device_type == on_device]
    return len([e for e in kernels if not e.name.startswith("Mem")]), counter.reads


def waits(step):
    """The error of a step that makes the host wait; None: it does not."""
    torch.cuda.synchronize()
    try:
        with no_waits():
            step()
    except RuntimeError as error:
        return error


def rows(where, count, seconds):
    steps, models, failed = {}, {}, {}
    for key, make in RIVALS.items():
        models[key] = Model(count, where.device)
        try:
            steps[key] = make(models[key])
            steps[key]()  # compiles, and makes states
            models[key].drop()
            if where.gpu and key[0] in ("Lomo", "AdaLomo") and (error := waits(steps[key])):
                raise error
        except Exception as error:  # a rival that cannot do this case is a row that says so
            failed[key] = error
            steps.pop(key, None)
    samples = {key: [] for key in steps}
    end, order = time.perf_counter() + seconds, list(steps)
    for round in range(timing.ROUNDS):
        if round >= 3 and time.perf_counter() > end:
            break
        random.Random(round).shuffle(order)
        for key in order:
            if where.gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            steps[key]()
            samples[key].append((time.perf_counter() - start) * 1e6)
            models[key].drop()
    clocks = record.clocks_while(steps["backward alone", ""])
    models["backward alone", ""].drop()
    floor = timing.Times(samples["backward alone", ""], None, "").quantile(0.5)
    base = counts(where, steps["backward alone", ""])
    for key in RIVALS:
        row = {
            "bench": "host", "case": f"{count} tensors", "what": key[0], "options": key[1],
            "dtype": "float32", "tensors": count, "numel": count * SIDE**2, "timed": "clock",
        }  # fmt: skip
        if key in failed:
            yield {**row, "note": timing.note(failed[key])}
            continue
        times = timing.Times(samples[key], None, "")
        models[key].drop()
        launches, reads = counts(where, steps[key])
        yield {
            **row,
            **{f"p{q}_us": f"{times.quantile(q / 100):.2f}" for q in (20, 50, 80)},
            "per_tensor_us": f"{(times.quantile(0.5) - floor) / count:.3f}",
            "launches": launches - base[0],
            "host_reads": reads,
            "clocks": clocks,
        }


def jobs(where):
    for rank, count in zip((4, 5, 1, 4), COUNTS):
        run = functools.partial(rows, where, count)
        yield suite.Job(rank, f"host: {count} tensors", run, count * SIDE**2)


if __name__ == "__main__":
    raise SystemExit(suite.main([jobs], __doc__))
