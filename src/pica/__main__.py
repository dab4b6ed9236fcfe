"""`python -m pica`: the same as the `pica` command."""

import sys

from pica.cli import main

if __name__ == "__main__":
    sys.exit(main())
