import sys

from memlayers.cli import main

sys.exit(main())
