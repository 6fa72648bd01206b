"""``python -m bertrt``: the command."""

import sys

from bertrt.cli import main

if __name__ == "__main__":
    sys.exit(main())
