"""`python -m sparsecnx.compat.minkowski (SCRIPT | -m MODULE) ARGUMENTS...`, see `runner`."""

from __future__ import annotations

import sys

from sparsecnx.compat.minkowski.runner import main

sys.exit(main(sys.argv[1:]))
