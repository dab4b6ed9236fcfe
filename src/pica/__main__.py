"""`python -m pica`: the same as the `pica` command."""

import sys

from _pica_entry import main

if __name__ == "__main__":
    sys.exit(main())
