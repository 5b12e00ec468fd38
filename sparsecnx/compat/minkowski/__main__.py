"""`python -m sparsecnx.compat.minkowski script.py ARGUMENTS...`: a script whose imports of MinkowskiEngine get this
package. `-m MODULE` in place of the script runs a module, as python's."""

from __future__ import annotations

import sys

from sparsecnx.compat.minkowski.runner import main

sys.exit(main(sys.argv[1:]))
