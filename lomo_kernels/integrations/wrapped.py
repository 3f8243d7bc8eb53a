"""The optimizer inside what a trainer has put around it."""

from ..optim import AdaLomo, Lomo


def unwrap(optimizer):
    """The `Lomo` or `AdaLomo` inside the wrappers of accelerate, Trainer and Lightning.

    accelerate's passes on `step`, `zero_grad`, the groups and the state, and hides the rest:
    `backward`, `accumulate`, `explain`, `last_grad_norm`. Lightning's passes for an instance of the
    class it wraps, with attributes of its own.

    Args:
        optimizer: what `accelerator.prepare(...)`, `trainer.optimizer` or `module.optimizers()`
            gives, or the optimizer itself.

    Raises:
        TypeError: another optimizer is inside.
    """
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    if not isinstance(optimizer, (Lomo, AdaLomo)):
        kind = type(optimizer)
        raise TypeError(
            f"the optimizer must be lomo_kernels' Lomo or AdaLomo, got "
            f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"
        )
    return optimizer
