"""`python -m lorakernels` is the command `lorakernels`."""

import sys

from lorakernels.cli import main

sys.exit(main())
