"""`python -m fp8c` is the command `fp8c`."""

import sys

from fp8c.cli import main

sys.exit(main())
