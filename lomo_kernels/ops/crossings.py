"""Which method of `product_update_` runs for a shape: measured crossings, in one table.

The epilogue reads and writes the weight alone, but its product is slower than the vendor's; by
blocks the vendor's product runs, and the gradient passes through the cache. So the epilogue is the
faster one up to a number of tokens, from which on the product is all that counts.
"""

import torch

# Of factors of 16 bits: part of the device's name -> tokens from which on blocks are faster. To be
# filled from rows of bench/bench_product_update.py.
MEASURED: dict[str, int] = {}
# Before anything was measured: at 650 TFLOP/s and 3 TB/s, a product that is 7 % slower than the
# vendor's costs as much as writing and reading the gradient saves at about 8,000 tokens.
DEFAULT = 8192


def method_for(right, rows, cols, tokens):
    """ "epilogue" or "blocks", for factors like `right`."""
    if right.device.type != "cuda" or right.element_size() != 2:
        return "blocks"  # fp32 factors: tensor cores would round them to TF32
    if rows % 16 or cols % 16:
        return "blocks"  # Triton's accesses would be narrow
    name = torch.cuda.get_device_name(right.device)
    limit = next((tokens for part, tokens in MEASURED.items() if part in name), DEFAULT)
    return "epilogue" if tokens < limit else "blocks"
