#!/usr/bin/env bash
# An environment with MinkowskiEngine 0.5.4, built for the CPU, and what the tests need:
#
#     tests/minkowski_engine.sh python3 build/minkowski
#
# Compiling it takes eight minutes on two cores; the wheel is kept in the user's cache folder for the next time. It builds
# with the setuptools and numpy of its day, not with later ones.
set -euo pipefail
python=$1 folder=$2
engine=0.5.4 torch=2.13.0 numpy=1.26.4 setuptools=68.2.2

"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 12))' || {
  echo "MinkowskiEngine $engine builds with Python 3.10 and 3.11, $python is $("$python" --version)." \
    'Name one: make minkowski-test PYTHON=python3.11' >&2
  exit 1
}
has_openblas() {
  echo '#include <cblas.h>' | "${CXX:-c++}" -x c++ - -shared -o /dev/null -lopenblas 2>/dev/null
}
if ! has_openblas && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libopenblas-dev
fi
has_openblas || {
  echo "MinkowskiEngine needs OpenBLAS and a C++ compiler. Debian, Ubuntu: apt-get install g++ libopenblas-dev" >&2
  exit 1
}

# On a machine with a GPU too: for CUDA it needs CUDA 11. Its setup.py calls the first pip of the PATH.
export CUDA_VISIBLE_DEVICES=
"$python" -m venv --clear "$folder"
folder=$(cd "$folder" && pwd)
PATH="$folder/bin:$PATH"
pip() {
  "$folder/bin/python" -m pip "$@" # no other environment's
}
pip install "torch==$torch" "numpy==$numpy" ninja pytest pytest-timeout hypothesis rich
pip install "setuptools==$setuptools" wheel # older than torch asks for, which only its compiler needs

# Another torch cannot use the wheel, so it does not stay in pip's own cache, which does not ask for the torch.
tag=$(python -c 'import sys, platform; print(f"cp{sys.version_info[0]}{sys.version_info[1]}-{platform.machine()}")')
cache="${XDG_CACHE_HOME:-$HOME/.cache}/sparsecnx/minkowskiengine-$engine-torch-$torch-$tag"
if [ ! -d "$cache" ]; then # it is there whole or not at all
  mkdir -p "$(dirname "$cache")"
  unfinished=$(mktemp -d "$cache.XXXXXX")
  trap 'rm -rf "$unfinished"' EXIT
  pip wheel "MinkowskiEngine==$engine" --no-build-isolation --no-deps --no-cache-dir --wheel-dir "$unfinished"
  mv -T "$unfinished" "$cache" || [ -d "$cache" ] # another has built it meanwhile
fi
pip install --no-deps "$cache"/*.whl
