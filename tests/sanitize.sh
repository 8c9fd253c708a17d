#!/usr/bin/env bash
# Runs the native library under the sanitizers of GCC or Clang, on every instruction set of this machine: the C interface
# and the threads through the drivers tests/native_*stress.cpp, and the Python tests of the kernels. Takes about a quarter
# of an hour, and is no part of CI. It needs Linux, a compiler and a Python with the `test` extra; CXX names another compiler than
# g++.
#
#     bash tests/sanitize.sh
#
# Prints one line per build, and PASSED at the end.
set -uo pipefail
exec < /dev/null

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
export CXX="${CXX:-g++}" ASAN_OPTIONS=abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1
UNDEFINED=undefined,float-cast-overflow
failed=0

# A copy, so that the library that Python finds is the one that is built here.
tar -C "$root" --exclude='*.so' --exclude=__pycache__ -cf - blobloss_fast csrc tests setup.py pyproject.toml README.md \
  LICENSE | tar -C "$scratch" -xf -
cd "$scratch" || exit 1
sed -i 's/"-g0"/"-g1"/' setup.py  # line numbers
export PYTHONPATH="$scratch" PYTHONDONTWRITEBYTECODE=1

# build SANITIZERS: the library with the flags of setup.py, and the drivers
build() {
  local flags="-fsanitize=$1 -fno-sanitize-recover=all -fno-omit-frame-pointer"
  rm -rf build
  CFLAGS="$flags" CXXFLAGS="$flags" LDFLAGS="$flags" BLOBLOSS_FAST_NATIVE=1 python setup.py -q build_ext --inplace \
    && for driver in stress labels_stress zones_stress; do
      $CXX -std=c++17 -O1 -g1 -pthread $flags -Icsrc "tests/native_$driver.cpp" blobloss_fast/_native.so \
        -Wl,-rpath,"$scratch/blobloss_fast" -o "$driver" || return 1
    done \
    && $CXX -std=c++17 -O1 -g1 -pthread $flags -Icsrc tests/native_threads_stress.cpp csrc/threads.cpp -o threads_stress
}

# say NAME COMMAND...: the last line that a command prints, or all of it if it fails
say() {
  local name="$1" start="$SECONDS"
  shift
  if "$@" > log 2>&1; then
    printf '%s: %s, %s s\n' "$name" "$(tail -n 1 log)" "$((SECONDS - start))"
  else
    cat log
    printf '%s: FAILED\n' "$name"
    failed=1
  fi
}

stress() {
  say "$1, table and loss" ./stress
  say "$1, labels" ./labels_stress
  say "$1, zones" ./zones_stress
  say "$1, threads" ./threads_stress
}

# The library alone is instrumented: Python and PyTorch get the run-time libraries that it needs, which includes that of
# C++, whose exceptions they intercept. What they allocate and never free is not of interest.
# Left out are tests of what there is no memory for (operator new ends the process where it should throw) and of how much
# memory is used (freed memory is kept to find its use).
python_tests() {
  local preload="" name
  for name in asan ubsan stdc++; do preload+=" $($CXX -print-file-name="lib$name.so")"; done
  build "address,$UNDEFINED" && ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$preload" \
    python -m pytest -q -p no:cacheprovider -m "not slow" -k "(native or test_connected_components) and not compile" \
    tests/test_native*.py tests/test_segment_stats.py tests/test_nearest_instance.py tests/test_connected_components.py \
    --deselect=tests/test_native_memory.py --deselect=tests/test_native_finish.py::test_no_memory_is_an_error
}

say "address: build" build address && stress address
say "undefined behaviour: build" build "$UNDEFINED" && stress "undefined behaviour"
say "threads: build" build thread && stress threads
say "Python, address and undefined behaviour" python_tests

[ "$failed" -eq 0 ] && echo PASSED || echo FAILED
exit "$failed"
