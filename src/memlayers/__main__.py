"""python -m memlayers"""

import sys

from memlayers.cli import main

if __name__ == "__main__":
    sys.exit(main())
