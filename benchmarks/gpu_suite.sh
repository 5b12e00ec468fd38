#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with nothing but Python, torch, Triton and, to compile operators, g++ and nvcc:
#
#     benchmarks/gpu_suite.sh OUT
#
# from the repository's root. In this order, each part in its time:
#
#     build     the CPU and the CUDA operators, in place, while parity runs: for this GPU alone. Where nvcc is missing or
#               fails, the CUDA operators are taken from a wheel in dist/ or build/ that was brought along, if there is one
#     parity    every Triton operator against its float64 reference (gpu_parity.py)
#     cuda      every CUDA operator likewise
#     kernels   every kernel's time against its floor, Triton beside CUDA beside torch's dense depthwise (kernels.py)
#     choices   both timed step by step, for the table from which auto chooses (choices.py): what is measured is added to
#               the one that is shipped, and put in its place for the parts that follow
#     encoder   the encoder's forward + backward, sparse and dense (encoder_step.py)
#     overhead  how busy a small model keeps the GPU, eagerly and as a CUDA graph (launch_overhead.py)
#     fcmae     a pretraining step, and a ViT's (fcmae_step.py)
#     minkowski the encoder as code for MinkowskiEngine has it, on its API here, and on MinkowskiEngine itself where that is
#               installed and built for CUDA (minkowski_encoder.py)
#     memcheck  every CUDA operator at small shapes under compute-sanitizer, where that is installed (sanitizer_run.py)
#     racecheck likewise, for races in shared memory
#     tests     the tests that use a GPU, where pytest and hypothesis are installed
#
# OUT gets summary.md, which says everything in tables, a JSON file of every part, parts.tsv and log.txt. Each result
# is written as soon as it is known. A part that fails or runs out of time does not stop the next ones; the exit code
# is 0 only if all went well, and 2 without a GPU. All parts together fit the time only if none needs all of its own:
# with two runs, ask for "build parity cuda kernels choices" first and for "build encoder ..." after.
#
#     SPARSECNX_SUITE_SECONDS  time for all of it, 530 by default
#     SPARSECNX_SUITE_PARTS    the parts to run, all of the above by default
#     SPARSECNX_SUITE_DEVICE   cpu: every part in a few seconds at toy sizes, kernels in Triton's interpreter, which
#                              shows that the suite works and measures nothing; those of CUDA alone are skipped
#     PYTHON                   python3 by default

set -uo pipefail

out=${1:?usage: benchmarks/gpu_suite.sh OUT}
device=${SPARSECNX_SUITE_DEVICE:-cuda}
total=${SPARSECNX_SUITE_SECONDS:-530}
parts=${SPARSECNX_SUITE_PARTS:-build parity cuda kernels choices encoder overhead fcmae minkowski memcheck racecheck tests}
python=${PYTHON:-python3}
here=$(dirname "${BASH_SOURCE[0]}")
failed=0

cd "$here/.." || exit 2
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore

say() {
  printf '[%3d s] %s\n' "$SECONDS" "$*" | tee -a "$out/log.txt"
}

# record NAME STATUS SECONDS WORDS: a line for the summary.
record() {
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$out/parts.tsv"
  [[ $2 == ok || $2 == skipped ]] || failed=1
  say "$1: $2${4:+, $4}"
  "$python" benchmarks/gpu_summary.py "$out" || failed=1
  rm -f "$out"/.*.tmp
}

wanted() {
  [[ " $parts " == *" $1 "* ]]
}

# limit SECONDS: that many, or what is left.
limit() {
  local left=$((total - SECONDS))
  echo $((left < $1 ? left : $1))
}

# part NAME SECONDS COMMAND...: run a command for at most that long; SECONDS_LEFT in it stands for its own deadline.
# Sets `status`: how it ended; empty where it was not to run.
part() {
  local name=$1 seconds own begin code words=
  seconds=$(limit "$2")
  shift 2
  status=
  wanted "$name" || return 0
  status=timeout
  if ((seconds < 6)); then
    record "$name" timeout 0 "no time was left"
    return 0
  fi
  # Its own deadline counts from when Python has imported everything.
  own=$((seconds > 30 ? seconds - 15 : seconds / 2))
  say "$name: at most $seconds s"
  begin=$SECONDS
  timeout -k 5 "$seconds" "${@//SECONDS_LEFT/$own}" 2>&1 | tee -a "$out/log.txt"
  code=${PIPESTATUS[0]}
  case $code in
    0) status=ok ;;
    124 | 137) status=timeout words="ended after $seconds s; what was known by then is written" ;;
    3) status=incomplete words="nothing wrong, but not everything ran" ;;
    *) status=failed words="exit code $code" ;;
  esac
  record "$name" "$status" $((SECONDS - begin)) "$words"
}

: >"$out/log.txt"
: >"$out/parts.tsv"
facts='
import platform, sys, torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("no CUDA device")
import triton
p = torch.cuda.get_device_properties(0) if sys.argv[1] == "cuda" else None
name = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}" if p else "CPU, Triton interpreter"
print(f"{name}; Python {platform.python_version()}, torch {torch.__version__}, Triton {triton.__version__}")
'
if ! machine=$("$python" -c "$facts" "$device" 2>&1); then
  say "${machine##*$'\n'}"
  exit 2
fi
say "$machine"
printf 'machine\tok\t%s\t%s\n' "$SECONDS" "$machine" >>"$out/parts.tsv"
if [[ $machine =~ capability\ ([0-9]+\.[0-9]+) ]]; then
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-${BASH_REMATCH[1]}+PTX} # tests read the PTX
fi

if [[ $device == cpu ]]; then
  export TRITON_INTERPRET=1
  small=(--device cpu --size atto --image 64 --ratio 0.5 --batch 2)
  parity=("${small[@]}" --dims 8 8 8 8 --stage 4 --dtypes float32 --jobs 1)
  kernels=("${small[@]}" --dims 8 8 8 8 --stage 4 --dtype float32 --programs layer_norm --backend triton)
  encoder=("${small[@]}" --dtype float32 --compiler eager --repeat-seconds 0.1)
  overhead=("${small[@]}" --dtype float32 --repeat-seconds 0.1)
  fcmae=("${small[@]}" --dtype float32 --compiler eager --repeat-seconds 0.1 --variants sparse dense)
  minkowski=("${small[@]}" --repeats 1)
  tests=(tests/test_masking.py)
else
  parity=() kernels=() encoder=() overhead=() fcmae=()
  minkowski=(--device cuda --size tiny base --batch 64)
  tests=(tests/ops tests/models tests/nn tests/test_packing.py tests/test_layout.py tests/test_backend.py tests/test_cubins.py
    -k "triton or cuda or graph or stream or test_layout.py or test_backend.py or test_cubins.py")
fi

# operators: yes, or why there are no CUDA operators.
operators() {
  "$python" -c 'from sparsecnx import _extension as e
print("yes" if e.cuda_loaded else e.cuda_why_not)' 2>&1 | tail -n 1
}

# unpack WHEEL: its compiled operators into the package.
unpack() {
  "$python" -c '
import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    names = [name for name in wheel.namelist() if name.startswith("sparsecnx/_") and name.endswith(".so")]
    wheel.extractall(".", names)
print(*names)' "$1"
}

if wanted build; then
  say "build: in the background"
  build_begin=$SECONDS
  # Politely: parity compiles kernels on the same cores.
  MAX_JOBS=6 nice -n 19 timeout -k 5 "$(limit 240)" \
    "$python" setup.py build_ext --inplace >"$work/build.txt" 2>&1 &
  build=$!
fi

part parity 120 "$python" benchmarks/gpu_parity.py "${parity[@]}" --seconds SECONDS_LEFT --out "$out/parity.json"

cuda=$(operators)
if wanted build; then
  # Nothing may compile while kernels are timed.
  until=$((SECONDS + 90))
  while kill -0 "$build" 2>/dev/null && ((SECONDS < until)); do sleep 1; done
  kill "$build" 2>/dev/null
  wait "$build"
  code=$?
  build_seconds=$((SECONDS - build_begin))
  tail -n 20 "$work/build.txt" >>"$out/log.txt"
  why=
  if ((code != 0)); then
    why=$(grep -iE 'error|no C\+\+ compiler|Python\.h' "$work/build.txt" | tail -n 1 | cut -c1-200 | tr '\t' ' ')
    why="exit code $code; $why"
  fi
  cuda=$(operators)
  if [[ $cuda != yes ]]; then
    why="${why:+$why; }$cuda"
    wheel=$(find -L dist build -maxdepth 2 -name 'sparsecnx-*.whl' 2>/dev/null | sort | tail -n 1)
    if [[ -n $wheel ]]; then
      say "build: unpacking $wheel: $(unpack "$wheel" 2>&1 | tail -n 1)"
      cuda=$(operators)
    fi
    if [[ -n $wheel && $cuda == yes ]]; then
      record build ok $build_seconds "CUDA operators of $wheel, compiling them here failed: $why"
    elif [[ $device == cpu && $code == 0 ]]; then
      record build ok $build_seconds "without CUDA operators: $why"
    else
      record build failed $build_seconds "without CUDA operators: $why${wheel:+; with those of $wheel: $cuda}"
    fi
  elif ((code != 0)); then
    record build failed $build_seconds "$why"
  else
    record build ok $build_seconds "CPU and CUDA operators compiled here, beside parity"
  fi
fi

# cuda_part NAME SECONDS COMMAND...: a part that is nothing without the CUDA operators.
cuda_part() {
  status=
  if [[ $device == cpu ]]; then
    wanted "$1" && record "$1" skipped 0 "needs a GPU"
  elif [[ $cuda != yes ]]; then
    wanted "$1" && record "$1" failed 0 "no CUDA operators: $cuda"
  else
    part "$@"
  fi
}

cuda_part cuda 60 "$python" benchmarks/gpu_parity.py --backend cuda "${parity[@]}" --seconds SECONDS_LEFT \
  --out "$out/parity-cuda.json"
if [[ $device == cuda && $cuda != yes ]]; then kernels+=(--backend triton); fi
part kernels 110 "$python" benchmarks/kernels.py "${kernels[@]}" --seconds SECONDS_LEFT --out "$out/kernels.json"
# Added to what is known: the table that is shipped, not one that an earlier suite left in OUT.
table=sparsecnx/data/gpu_choices.json measured=$out/gpu_choices.json
if wanted choices && [[ $device == cuda ]]; then cp "$table" "$measured"; fi
cuda_part choices 60 "$python" benchmarks/choices.py --seconds SECONDS_LEFT --out "$measured"
if [[ $status == ok || $status == incomplete ]] && ! cmp -s "$measured" "$table"; then
  if why=$("$python" -c 'import pathlib, sys; from sparsecnx import choices; choices.read(pathlib.Path(sys.argv[1]))' \
    "$measured" 2>&1); then
    cp "$measured" "$table" && say "choices: auto goes by them from here on"
  else
    record choices failed 0 "not a table: ${why##*$'\n'}"
  fi
fi
part encoder 125 "$python" benchmarks/encoder_step.py "${encoder[@]}" --seconds SECONDS_LEFT --out "$out/encoder.json"
part overhead 40 "$python" benchmarks/launch_overhead.py "${overhead[@]}" --seconds SECONDS_LEFT --out "$out/overhead.json"
part fcmae 80 "$python" benchmarks/fcmae_step.py "${fcmae[@]}" --seconds SECONDS_LEFT --out "$out/fcmae.json"
part minkowski 40 "$python" benchmarks/minkowski_encoder.py "${minkowski[@]}" --out "$out/minkowski.json"

if wanted memcheck || wanted racecheck; then
  sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2>/dev/null)
  for tool in memcheck racecheck; do
    if [[ $device == cuda && -z $sanitizer ]]; then
      wanted $tool && record $tool skipped 0 "compute-sanitizer is not installed"
    else
      # Tensors in allocations of their own, so that reading past one shows; torch's own kernels are not looked at.
      cuda_part $tool 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool $tool --error-exitcode 1 \
        --kernel-name kns=sparsecnx --print-limit 20 "$python" benchmarks/sanitizer_run.py
    fi
  done
fi

if wanted tests; then
  missing=$("$python" -c '
import importlib.util
print(*(name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None))')
  if [[ -n $missing ]]; then
    record tests skipped 0 "not installed: $missing"
  else
    # Several processes, since most of a test's time goes into compiling; ended politely, so that pytest sums up.
    workers=()
    if [[ $device == cuda ]] && "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
    part tests 200 env -u PYTHONWARNINGS timeout -s INT -k 10 SECONDS_LEFT "$python" -m pytest -q -rfE -p no:cacheprovider \
      "${workers[@]}" "${tests[@]}"
  fi
fi

say "done: $out/summary.md"
exit $failed
