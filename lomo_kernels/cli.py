"""`lomo-kernels finetune | plan | doctor`."""

import argparse
import contextlib
import inspect
import json
import platform
import re
import sys
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, finetune, memory, ops
from .finetune import config
from .finetune.ranks import LostError, Watch
from .finetune.settings import typed
from .integrations import shapes
from .integrations.common import ModelError
from .integrations.peft import ADAPTERS, ALONE
from .optim import OPTIMIZERS
from .optim.arguments import STRATEGIES

OURS = " and ".join(OPTIMIZERS)


def main(arguments=None):
    options = parser().parse_args(arguments)
    return options.command(options)


def parser():
    parser = argparse.ArgumentParser(prog="lomo-kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    doctor = commands.add_parser(
        "doctor", help="versions, what was built, and which backends can run here"
    )
    doctor.set_defaults(command=_doctor)

    tune = commands.add_parser(
        "finetune",
        help="fine-tune every parameter of a causal language model",
        description="Fine-tunes every parameter of a pretrained causal language model and shows "
        "that it learned. Without options: SmolLM2-135M-Instruct on Python's language reference.",
    )
    tune.set_defaults(command=_finetune)
    _add_finetune_options(tune)

    plan = commands.add_parser(
        "plan",
        help="what a training step of a model would need, without the model",
        description="Predicts the memory of a training step, per device, from a model's "
        "configuration: a real step on tensors without data.",
    )
    plan.set_defaults(command=_plan)
    _add_plan_options(plan)
    return parser


def _add_finetune_options(tune):
    """All are texts here: `settings.typed` knows their types, for a file of options too."""
    for each in (*fields(finetune.Settings), *fields(finetune.Output)):
        name, help = "--" + each.name.replace("_", "-"), each.metadata["help"]
        if each.type is bool:
            tune.add_argument(
                name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help
            )
            continue
        if each.default is not None and "by default" not in help:
            help += f" (default {each.default})"
        tune.add_argument(name, default=argparse.SUPPRESS, help=help)
    tune.add_argument("--config", help="YAML file of these options; the command line goes before")
    tune.add_argument(
        "--dump-config", action="store_true", help="print such a file with every option, and stop"
    )
    tune.add_argument(
        "--dry-run", action="store_true",
        help="print what the run would do: tokens, steps, memory by kind; and stop",
    )  # fmt: skip


def _add_plan_options(plan):
    defaults = inspect.signature(memory.plan).parameters

    def add(name, help, type=str, **more):
        default = defaults[name[2:].replace("-", "_")].default
        if default is not None and default is not inspect.Parameter.empty:
            help += f" (default {default})"
        plan.add_argument(name, help=help, type=type, default=argparse.SUPPRESS, **more)

    names = ", ".join(shapes.CONFIGS)
    add("--model", f"a config.json, a folder, a model id of the hub, or {names}", required=True)
    known = ", ".join(memory.OPTIMIZERS)
    add("--optimizer", f"{known}; by default lomo, and adamw of lora and prefix")
    add("--adapter", f"{', '.join(ADAPTERS)}: trained in place of the model or beside it")
    add("--lora-rank", "rank of LoRA's matrices", int)
    add("--lora-dropout", "part of LoRA's inputs that is dropped", float)
    add("--lora-targets", "modules that get LoRA; by default peft's choice")
    add("--prefix-tokens", "of a prefix", int)
    add("--clip-grad-norm", f"of {OURS}; 0 switches it off", float)
    add("--strategy", f"of {OURS}: {', '.join(STRATEGIES)}")
    add("--rounding", f"of {OURS}: auto, nearest, stochastic or split")
    add("--dtype", "of the parameters: float32, bfloat16 or float16")
    add("--batch", "sequences of a step, on each device", int)
    add("--sequence", "tokens of a sequence", int)
    plan.add_argument(
        "--checkpointing", nargs="?", const="non_reentrant", default=argparse.SUPPRESS,
        help="recompute activations in backward; non_reentrant or reentrant",
    )  # fmt: skip
    add("--attention", "eager, sdpa or another of transformers'")
    add("--devices", "how many share parameters, gradients and states", int)
    add("--sharding", "none, fsdp2 or zero3; by default fsdp2 for more than one device")
    add("--units", "of fsdp2: layer, or fine: attention, MLP, embedding and head apart")
    add("--offload", "cpu: parameters, gradients and states live in host memory")
    add("--device", "cuda or cpu")
    add("--device-memory", "of each device, bytes or e.g. 24GiB: says whether it fits")
    add("--search", "batch or sequence: finds the largest that fits")
    plan.add_argument("--json", action="store_true", help="print bytes as json")
    plan.add_argument("--plot", metavar="FILE", help="draw a bar chart; needs matplotlib")


def _plan(options):
    options = {key: value for key, value in vars(options).items() if key != "command"}
    as_json, path = options.pop("json"), options.pop("plot")
    if options.get("clip_grad_norm") == 0:
        options["clip_grad_norm"] = None
    try:
        with _progress() as say:
            found = memory.plan(**options, progress=say)
        if path is not None:
            found.plot(path)
    except (ValueError, TypeError, RuntimeError, OSError, ModelError) as error:
        return _fail(" ".join(str(error).split()))
    except ImportError as error:
        return _fail(error)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        _show_plan(found)
    return 1 if found.fits is False else 0


@contextlib.contextmanager
def _progress():
    """Gives a function that shows what is being done, where there is a terminal to show it on."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield status.update


def _show_plan(found):
    from rich.console import Console
    from rich.table import Table

    job, size = found.job, memory.report.size
    where = "each of the devices" if job.shards > 1 else "the device"
    host = found.summary.host
    table = Table(
        title=f"{found.model}, {found.parameters:,} parameters: {job.name}, {job.dtype}, "
        f"{job.batch} x {job.sequence} tokens, checkpointing {job.checkpointing or 'no'}",
        caption=f"on {where}; the peak is in {found.place}",
    )
    for column in ("", "at the peak", "highest", *(["in host memory"] if host else [])):
        table.add_column(column, justify="left" if column == "" else "right")
    for category in memory.CATEGORIES:
        cells = [found.at_peak[category], found.maxima[category]]
        cells += [host.peak.parts[category]] if host else []
        table.add_row(category, *map(size, cells))
    table.add_section()
    table.add_row("peak", size(found.peak), "", *([size(found.host_peak)] if host else []))
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 100
    console.print(table)
    console.print(found.verdict(), markup=False)


def _finetune(options):
    try:
        with Watch():
            return _tune(options)
    except finetune.StoppedError as stopped:
        finetune.Display().say(str(stopped))
        return 130
    except KeyboardInterrupt:
        return _fail("stopped; what is in --out is whole", 130)
    except (
        ValueError, ModelError, finetune.DataError, finetune.OutputError,
        LostError,
    ) as error:  # fmt: skip
        return _fail(error)
    except ImportError as error:
        return _fail(f"{error}: pip install 'lomo_kernels[finetune]'")


def _tune(options):
    given = {key: value for key, value in vars(options).items() if key != "command"}
    path, dump, dry = (given.pop(key) for key in ("config", "dump_config", "dry_run"))
    given = (config.read(path) if path is not None else {}) | given
    given.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = given["device"] != "cpu" and not given.get("autocast")
    given.setdefault("dtype", "bfloat16" if on_gpu else "float32")
    settings = finetune.Settings(**typed(finetune.Settings, given))
    output = finetune.Output(**typed(finetune.Output, given))
    others = [name for name in (output.compare or "").split(",") if name]
    finetune.variants(settings, others)
    if dump:
        print(config.dumped(settings, output), end="")
        return 0
    display = finetune.Display()
    if dry:
        finetune.dry_run(settings, display)
        return 0
    report = finetune.run(settings, output, display)
    finetune.compare(settings, report, others, display)
    doubt = report.doubt()
    if output.out is not None:
        kind = "adapter" if settings.adapter in ALONE else "model"
        what = f"fine-tuned {kind}" if doubt is None else kind
        display.say(f"the {what} is in {output.out}/model")
    if doubt is not None:
        display.say(f"no success: {doubt}")
    return 1 if report.failed else 0


def _fail(message, status=2):
    print(f"lomo-kernels: {message}", file=sys.stderr)
    return status


def _doctor(options):
    """Prints what a bug report needs; 0 when something can run the update on this machine."""
    rows = {
        "lomo_kernels": __version__,
        "installed as": _origin(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch's cuda": torch.version.cuda or torch.version.hip or "none: a CPU build",
        **{name: _version(name) for name in ("triton", "transformers", "accelerate")},
    }
    try:
        rows |= ops.build_info()
    except ImportError as error:
        rows["extension module"] = f"missing: {error}"
    for name, value in rows.items():
        print(f"{name:24}{value}")

    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    healthy = True
    for device in devices:
        able = []
        for name in ops.BACKENDS:
            reason = ops.unavailable(name, device)
            print(f"{f'{name} on {device}':24}{'runs' if reason is None else f'no: {reason}'}")
            able += [name] if reason is None else []
        healthy &= bool(able)
        print(f"{f'auto on {device}':24}{able[0] if able else 'nothing'}")
    return 0 if healthy else 1


def _origin():
    """A wheel for many machines, a build for this one, or a source tree."""
    here = Path(__file__).parent
    with contextlib.suppress(metadata.PackageNotFoundError):
        found = metadata.distribution(here.name)
        tags = re.findall("^Tag: (.*)$", found.read_text("WHEEL") or "", re.MULTILINE)
        if tags and Path(found.locate_file(here.name)).resolve() == here.resolve():
            kind = "wheel" if "manylinux" in tags[0] else "built from source,"
            return f"{kind} {', '.join(tags)}"
    return f"source tree in {here.parent}"


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
