"""`lomo-kernels finetune | doctor`."""

import argparse
import platform
import sys
from dataclasses import fields
from importlib import metadata

import torch

from . import __version__, finetune, ops
from .finetune import checkpoint, data
from .integrations import huggingface


def main(arguments=None):
    parser = _parser()
    options = parser.parse_args(arguments)
    return options.command(options)


def _parser():
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
    return parser


def _add_finetune_options(tune):
    defaults = {field.name: field.default for field in fields(finetune.Settings)}

    def add(name, help, type=str, **more):
        default = defaults.get(name[2:].replace("-", "_"))
        if default is not None and "by default" not in help:
            help += f" (default {default})"
        tune.add_argument(name, help=help, type=type, default=argparse.SUPPRESS, **more)

    add("--model", "smollm2-135m-instruct, a local directory, a .gguf file or a model id")
    add("--train", "file of examples: .jsonl with prompt and completion (or text), or plain text")
    add("--held-out", "file of examples for the score; without it a tenth of --train")
    add("--out", "folder for checkpoints and the model; an interrupted run goes on there")
    add("--optimizer", "lomo, adalomo, sgd or adamw")
    add("--compare", "other optimizers on the same data, e.g. sgd,adamw or sgd=0.1,adamw=3e-5")
    add(
        "--lr",
        "largest learning rate; by default "
        + ", ".join(f"{lr:g} for {name}" for name, lr in finetune.OPTIMIZERS.items()),
        float,
    )
    add("--schedule", "linear, cosine or constant")
    add("--warmup", "fraction of the steps in which the learning rate rises", float)
    add(
        "--epochs",
        "passes over the examples; by default 1, and 32 steps of the default data",
        float,
    )
    add("--steps", "number of steps, instead of --epochs", int)
    add("--batch-size", "examples in a step", int)
    add("--length", "tokens of an example at most", int)
    add("--clip-grad-norm", "largest gradient norm; 0 switches clipping off", float)
    add("--norm", "global: one norm of all gradients; tensor: each tensor's own")
    add(
        "--strategy",
        "how lomo and adalomo update: auto, one_backward, two_backward, partial or immediate",
    )
    add("--clip-grad-value", "largest absolute value of a gradient element", float)
    add("--weight-decay", "decoupled weight decay", float)
    add(
        "--loss-scale",
        "factor of the loss: a number, dynamic, none, or auto: dynamic for float16",
        _loss_scale,
    )
    add("--dtype", "float32, bfloat16 or float16; by default float32 on a CPU, bfloat16 on a GPU")
    add("--rounding", "of 16-bit parameters: auto, nearest, stochastic or split")
    add("--backend", "auto, native, triton or reference")
    add("--device", "cpu, cuda, cuda:1, ...; by default a GPU where there is one")
    add("--eval-size", "held-out examples that are scored", int)
    add("--save-every", "steps between checkpoints; by default a quarter of the run", int)
    add("--seed", "of the order of the examples and of stochastic rounding", int)
    tune.add_argument(
        "--checkpointing", action="store_true", default=argparse.SUPPRESS,
        help="recompute activations in backward: less memory, a third more time",
    )  # fmt: skip


def _loss_scale(text):
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        return text  # auto and dynamic; anything else the optimizer refuses


def _finetune(options):
    options = {key: value for key, value in vars(options).items() if key != "command"}
    if options.get("clip_grad_norm") == 0:
        options["clip_grad_norm"] = None
    options.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    options.setdefault("dtype", "float32" if options["device"] == "cpu" else "bfloat16")
    out, save_every = options.pop("out", None), options.pop("save_every", None)
    others = [name for name in options.pop("compare", "").split(",") if name]
    try:
        display = finetune.Display()
        settings = finetune.Settings(**options)
        report = finetune.run(settings, out, save_every, display)
        finetune.compare(settings, report, others, display)
    except finetune.StoppedError as stopped:
        display.say(str(stopped))
        return 130
    except (
        ValueError, huggingface.ModelError, data.DataError, checkpoint.ResumeError,
    ) as error:  # fmt: skip
        return _fail(error)
    except ImportError as error:
        return _fail(f"{error}: pip install 'lomo_kernels[finetune]'")
    if out is not None:
        display.say(f"the fine-tuned model is in {out}/model")
    return 0


def _fail(message):
    print(f"lomo-kernels: {message}", file=sys.stderr)
    return 2


def _doctor(options):
    """Prints what a bug report needs; 0 when something can run the update on this machine."""
    rows = {
        "lomo_kernels": __version__,
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


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
