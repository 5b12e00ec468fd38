"""`python -m sparsecnx.compat.minkowski (SCRIPT | -m MODULE) ARGUMENTS...`, see `installation`."""

from __future__ import annotations

import sys

from sparsecnx.compat.minkowski.installation import main

sys.exit(main(sys.argv[1:]))
