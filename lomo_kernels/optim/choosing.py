"""Which gradients wait for the norm, from sizes alone: the one rule for optimizers and plans.

A strategy is the set of parameters whose gradients wait: all of them ("one_backward"), none
("two_backward"), or those nearest the input ("partial").
"""

from typing import NamedTuple


class Waits(NamedTuple):
    """What a step would keep of one parameter until the norm is known."""

    key: object  # of the parameter
    name: str
    nbytes: int  # its factors, or its gradient where that is smaller
    beside: bool  # whether in memory of its own, not in that of activations which backward frees


class Choice(NamedTuple):
    strategy: str
    why: str
    keeps: frozenset  # keys whose gradients wait, where it is "partial"


def size(count):
    return f"{count / 2**20:.1f} MiB"


def factors_are_smaller(factors, gradient):
    """Whether a weight keeps its factors, of so many bytes, in place of its gradient."""
    return factors < gradient


def default_budget(parameters):
    """Bytes that may wait beside the memory of activations, from the bytes of the parameters."""
    return parameters // 4


def chosen(strategy, small, listed, others, budget, once=False):
    """The strategy of a step, and why.

    Args:
        strategy: the optimizer's argument.
        small: Waits of vectors and scalars.
        listed: Waits of the watched weights in the order of their use.
        others: bytes of further gradients, which have no factors.
        budget: bytes that may wait beside the memory of activations.
        once: whether a backward can run once only, because of reentrant checkpointing.
    """
    if strategy != "auto":
        keeps = nearest_the_input(small, listed, budget) if strategy == "partial" else frozenset()
        return Choice(strategy, "asked for", keeps)
    needed = others + sum(each.nbytes for each in listed if each.beside)
    text = f"{size(needed)} would wait beside the room of activations, "
    if needed <= budget:
        return Choice("one_backward", f"{text}within the budget of {size(budget)}", frozenset())
    text += f"above the budget of {size(budget)}"
    if once:
        why = f"{text}, but reentrant checkpointing lets a backward run once only"
        return Choice("one_backward", why, frozenset())
    keeps = nearest_the_input(small, listed, budget)
    name = "partial" if keeps else "two_backward"
    return Choice(name, text, keeps)


def nearest_the_input(small, listed, budget):
    """Keys of vectors, and of the weights that forward used first, as far as the budget goes.

    Backward comes to them last, so a second backward for the others ends above them.
    """
    kept = set()
    for each in [*small, *listed]:
        budget -= each.nbytes
        if budget < 0:
            break
        kept.add(each.key)
    return frozenset(kept)
