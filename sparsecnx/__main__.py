"""`python -m sparsecnx` is the command `sparsecnx`."""

import sys

from sparsecnx_command import main

sys.exit(main())
