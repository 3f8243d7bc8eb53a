"""The graph of a loss, read before backward runs."""

from typing import NamedTuple


class Graph(NamedTuple):
    leaves: dict  # id -> tensor whose gradient a backward accumulates
    repeats: bool  # whether a part of it exists in backward alone: reentrant checkpointing


def graph_of(loss):
    """Follows the nodes from the loss; about a microsecond for each."""
    leaves, repeats = {}, False
    if loss.is_leaf and loss.requires_grad:
        leaves[id(loss)] = loss
    nodes = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves[id(node.variable)] = node.variable
        repeats = repeats or node.name() == "CheckpointFunctionBackward"
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return Graph(leaves, repeats)
