"""What a step of a Llama model costs by the optimizer's own rules: bytes that wait, operations."""

from lomo_kernels import ops
from lomo_kernels.ops import product_sumsq
from lomo_kernels.optim import choosing

from .llama import layer, matrices, parameters, vectors

# -- bytes -----------------------------------------------------------------------------------------


def factor_bytes(m, tokens, itemsize):
    """Of the left and the right factor."""
    left = 8 * tokens if m.embedding else tokens * m.rows * itemsize
    return left, tokens * m.cols * itemsize


def keeps_factors(m, tokens, itemsize):
    return choosing.factors_are_smaller(sum(factor_bytes(m, tokens, itemsize)), m.numel * itemsize)


def waits(shape, tokens, itemsize, checkpointing=False):
    """What each matrix would keep until the norm is known, as `Lomo.would_wait` lists it; the keys
    are indices into matrices(shape)."""
    listed, alive = [], False  # the input that is shared
    for i, m in enumerate(matrices(shape)):
        alive = alive and m.shares
        nbytes = m.numel * itemsize
        if keeps_factors(m, tokens, itemsize):
            left, right = factor_bytes(m, tokens, itemsize)
            nbytes, alive = left + (0 if alive else right), True
        listed.append(choosing.Waits(i, m.name, nbytes, checkpointing and m.recomputed))
    return listed


def waiting(shape, kept, tokens, itemsize):
    """Bytes at the end of backward of what waits; `kept`: indices into matrices(shape), from 0."""
    listed = waits(shape, tokens, itemsize)
    return vectors(shape) * itemsize + sum(each.nbytes for each in listed if each.key in kept)


def choice(strategy, shape, tokens, itemsize, checkpointing=False):
    """The optimizer's own rule on the sizes of the whole model, with the default budget."""
    small = [choosing.Waits("vectors", "", vectors(shape) * itemsize, True)]
    budget = choosing.default_budget(parameters(shape) * itemsize)
    listed = waits(shape, tokens, itemsize, checkpointing)
    return choosing.chosen(strategy, small, listed, 0, budget)


def partial(shape, tokens, itemsize):
    """Indices of the matrices that wait by strategy "partial"."""
    return set(choice("partial", shape, tokens, itemsize).keeps) - {"vectors"}


def auto(shape, tokens, checkpointing, itemsize=2):
    """What strategy "auto" takes."""
    return choice("auto", shape, tokens, itemsize, checkpointing).strategy


# -- operations ------------------------------------------------------------------------------------


def gram_flops(m, tokens, inputs_are_there=False):
    """ops.product_sumsq_: tiles of half of two symmetric matrices. One-hot rows cost nothing, and
    neither do inputs whose tiles another weight has made."""
    tile = product_sumsq.TILE
    full, rest = divmod(tokens, tile)
    squares = full * tile**2 + rest**2  # of the tiles on the diagonal
    width = (0 if m.embedding else m.rows) + (0 if inputs_are_there else m.cols)
    return width * (tokens**2 + squares)


def product_flops(m, tokens):
    """Forward, an input's gradient, or a weight's gradient; an embedding multiplies nothing."""
    return 0 if m.embedding else 2 * tokens * m.numel


def attention_flops(shape, tokens):
    """Both products of a layer's scores in forward, without use of causality; backward is twice."""
    return 4 * tokens**2 * shape.hidden


def by_gram(m, tokens):
    return ops.gram_is_cheaper(tokens, m.rows, m.cols)


def first_flops(m, tokens, itemsize, strategy, waits, inputs_are_there):
    """A weight's gradient and its norm in the first or only backward, and updates that waited."""
    form = product_flops(m, tokens)
    if strategy == "none":
        return form
    if not waits:  # until the second backward
        return gram_flops(m, tokens) if by_gram(m, tokens) else form
    if not keeps_factors(m, tokens, itemsize):
        return form
    norm = gram_flops(m, tokens, inputs_are_there) if by_gram(m, tokens) else form
    return form + norm


def flops(shape, tokens, checkpointing, strategy, itemsize=2):
    """Matrix products of a step with one sequence, 2 for a multiplication and addition."""
    listed = matrices(shape)
    every = set(range(len(listed)))
    kept = {"none": set(), "one_backward": every, "two_backward": set()}.get(strategy)
    if kept is None:
        kept = partial(shape, tokens, itemsize)
    attention = attention_flops(shape, tokens)
    forward = sum(product_flops(m, tokens) for m in listed) + shape.layers * attention
    total = forward + 2 * shape.layers * attention
    measured = False  # whether the norm of a weight with the same inputs is by Gram matrices
    for i, m in enumerate(listed):
        measured = measured and m.shares
        total += product_flops(m, tokens)  # the gradient of its input
        total += first_flops(m, tokens, itemsize, strategy, i in kept, measured)
        measured |= i in kept and by_gram(m, tokens)
    recomputed = layer_flops(shape, tokens, strategy)
    if checkpointing:
        total += shape.layers * recomputed
    if strategy in ("none", "one_backward"):
        return total
    # The second backward ends at the first matrix that does not wait.
    again = listed[max(kept, default=-1) + 1 :]
    total += sum(2 * product_flops(m, tokens) for m in again)
    names = [m.name for m in again]
    total += 2 * names.count("value") * attention
    if checkpointing:
        total += names.count("down") * recomputed
    return total


def layer_flops(shape, tokens, strategy):
    """The forward of a layer as checkpointing repeats it.

    It ends as soon as everything is saved again: before the last product where torch does it,
    after it where the optimizer's function does.
    """
    listed = layer(shape)[: -1 if strategy == "none" else None]
    return sum(product_flops(m, tokens) for m in listed) + attention_flops(shape, tokens)
