"""Entry point of ``python -m mtrl_vec``."""

import sys

if __name__ == "__main__":
    try:
        from mtrl_vec.commands.cli import main  # takes seconds, in which somebody may press Ctrl-C

        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
