"""`python -m fallow`: the same as the command `fallow`, for launchers that start modules (torchrun -m fallow)."""

import sys

from fallow.cli import main

if __name__ == "__main__":
    sys.exit(main())
