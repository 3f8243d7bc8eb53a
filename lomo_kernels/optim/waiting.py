"""The gradients that wait until the norm of all gradients is known."""

from collections import Counter

import torch

from .choosing import factors_are_smaller, size
from .gradient import Ends, Factors, Gradient


class Waiting(dict):
    """id(param) -> Gradient."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0  # a bound: an input that several weights share counts for each of them

    def add(self, param, grad, all_wait=True):
        """`all_wait`: whether the gradients beside this one wait as well."""
        grad = grad.detach() if grad.requires_grad else grad
        if not all_wait and param.ndim < 2 and grad.untyped_storage().nbytes() > grad.nbytes:
            grad = grad.clone()  # of FSDP2 it is a view, and would keep the buffer of a whole unit
        gradient = self.get(id(param))
        if gradient is None:
            self[id(param)] = Gradient(param, grad)
            self.nbytes += grad.nbytes
        else:
            self.nbytes += 0 if gradient.dense is not None else grad.nbytes
            gradient.add(grad)

    @torch.no_grad()
    def add_factors(self, param, factors):
        """Unless the gradient itself is not larger; says whether. Factors of micro-batches that
        together are not smaller become the gradient, so that accumulation never holds more."""
        gradient = self.get(id(param))
        if gradient is not None and gradient.dense is not None:
            return False
        if gradient is not None and gradient.has_experts != (factors.experts is not None):
            return False  # a product of another kind
        before = 0 if gradient is None else gradient.nbytes
        if not factors_are_smaller(before + factors.nbytes, param.nbytes):
            if gradient is not None:
                gradient.form()
                self.nbytes += gradient.nbytes - before
            return False
        if factors.copies is not None:
            factors = Factors.of(*factors.copies())
        self.setdefault(id(param), Gradient(param)).keep(factors)
        self.nbytes += factors.nbytes
        return True

    def drop(self, param):
        """Takes out the gradient of a parameter; None where none waits."""
        gradient = self.pop(id(param), None)
        self.nbytes -= 0 if gradient is None else gradient.nbytes
        return gradient

    def check(self):
        for gradient in self.values():
            gradient.check()

    def read_ends(self):
        Ends.to_host(ends for gradient in self.values() for ends in gradient.ends)

    @property
    def tensors(self):
        return [tensor for gradient in self.values() for tensor in gradient.tensors]

    def beside(self, watch):
        """Bytes of matrices' gradients and factors that take memory beside that of the activations,
        as `choosing.chosen` counts them."""
        return storage_bytes(
            tensor
            for gradient in self.values()
            if gradient.param.ndim > 1 and watch.is_beside(gradient.param)
            for tensor in gradient.tensors
        )

    def measure(self, norms, numbers):
        """Notes the norms of everything; says how each was found."""
        self.read_ends()
        found = Counter()
        dense = [g for g in self.values() if not g.factors]
        norms.measure_tensors([(numbers[id(g.param)], g.dense) for g in dense])
        found["gradient"] = len(dense)
        factored = [(numbers[id(g.param)], g) for g in self.values() if g.factors]
        together = norms.measure_products(factored)
        found["gram"] = len(together)
        for number, gradient in factored:
            if number not in together:
                found[norms.measure(number, gradient)] += 1
        return found


def storage_bytes(tensors):
    """Of different storages: one input may feed several weights."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Report:
    """What waited in a step, as text."""

    def __init__(self, waiting, found, name):
        self.nbytes = storage_bytes(waiting.tensors)
        self.found = found
        self.factored = [g.param.nbytes for g in waiting.values() if g.factors]
        dense = [(g.nbytes, name(g.param)) for g in waiting.values() if not g.factors]
        self.held = sum(nbytes for nbytes, _ in dense)
        self.largest = [name for _, name in sorted(dense, reverse=True)[:3]]

    def lines(self):
        found = self.found
        yield (
            f"until the norm was known {len(self.factored)} weights kept factors in place of "
            f"{size(sum(self.factored))} of gradients, {found['gradient']} parameters their "
            f"gradients, {size(self.held)}; {size(self.nbytes)} in all"
        )
        if self.largest:
            yield f"largest gradients held: {', '.join(self.largest)}"
        yield (
            f"norms of what waited: {found['gram']} by Gram matrices, {found['blocks']} by blocks "
            f"of the gradient, {found['gradient']} of gradients"
        )
