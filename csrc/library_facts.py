"""Record the size and the digest of compiled libraries, which sparsecnx compares before it loads them.

setup.py does so after a build. Whoever changes a library later (strip, patchelf, a repaired wheel) does it again:

    python csrc/library_facts.py FOLDER     the folder `sparsecnx` of an unpacked wheel or of an installation
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any


def library_facts(package: Path) -> dict[str, dict[str, Any]]:
    """Return what `_build.json` holds about the libraries in a package folder, by file name."""
    contents = {library.name: library.read_bytes() for library in sorted(package.glob("_C*.*so"))}
    return {
        name: {"size": len(content), "blake2b": hashlib.blake2b(content).hexdigest()}
        for name, content in contents.items()
    }


def main(package: Path) -> None:
    file = package / "_build.json"
    facts = {**json.loads(file.read_text()), "libraries": library_facts(package)}
    file.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
