"""For fake tensors, which have shapes and no data: the operations allocate what others do, no more.

Runs under torch's FakeTensorMode in place of any other backend, so that a plan of memory takes a
real step's way through every check.
"""


def _nothing(*args, **options):
    pass


lomo_update_ = grad_sumsq_ = decide_ = adalomo_sums_ = _nothing
adalomo_squares_ = adalomo_parts_update_ = _nothing


def adalomo_update_(items, *, weights, **options):
    from .native import adalomo_scratch

    weights.new_empty(adalomo_scratch(items))


def adalomo_statistics_(out, items, *, weights, **options):
    from .native import adalomo_memory

    kept, once = adalomo_memory(items)
    kept = weights.new_empty(sum(kept))
    weights.new_empty(once)
    return kept
