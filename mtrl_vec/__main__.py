"""Entry point of ``python -m mtrl_vec``."""

import sys

from mtrl_vec.cli import main

if __name__ == "__main__":
    sys.exit(main())
