"""`python -m sparsecnx` is the command `sparsecnx`."""

import sys

from sparsecnx.cli import main

sys.exit(main())
