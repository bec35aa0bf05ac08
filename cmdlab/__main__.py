"""`python -m cmdlab` is the command `cmdlab`."""

import sys

from cmdlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
