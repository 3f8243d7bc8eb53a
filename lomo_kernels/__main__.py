"""`python -m lomo_kernels`, which torchrun can start: the command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
