"""`python -m ttt3r.training OUT`: train on rendered worlds; see `--help`."""

import sys

from ttt3r.training.command import main

# Worker processes import what they run by its module's name: `command`, not `__main__`.
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
