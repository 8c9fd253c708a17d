#!/usr/bin/env bash
# Compiles the native library for 64-bit Arm, where it has one instruction set and rounds with fused multiply-adds, and
# runs the drivers tests/native_*stress.cpp on an emulated machine. Takes about five minutes, and is no part of CI. On
# Debian and Ubuntu:
#
#     apt-get install g++-aarch64-linux-gnu qemu-user-static
#     bash tests/cross_aarch64.sh
#
# Any warning is an error. Prints PASSED at the end.
set -euo pipefail
exec < /dev/null

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
compiler=aarch64-linux-gnu-g++
emulator="$(command -v qemu-aarch64-static || command -v qemu-aarch64 || true)"
if ! command -v "$compiler" > /dev/null || [ -z "$emulator" ]; then
  echo "MISSING: $compiler or qemu-aarch64; install g++-aarch64-linux-gnu and qemu-user-static"
  exit 1
fi
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

# As in setup.py, which knows no instruction set but the baseline there.
flags=(-std=c++17 -O3 -pthread -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast)
for driver in native_stress native_labels_stress native_zones_stress native_threads_stress; do  # not all that they share is used by all
  "$compiler" "${flags[@]}" -Wall -Wextra -Werror -Wno-unused-function -I"$root/csrc" -static \
    "$root"/csrc/*.cpp "$root/tests/$driver.cpp" -o "$scratch/$driver"
  "$emulator" "$scratch/$driver"
done
echo PASSED
