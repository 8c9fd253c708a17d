#!/usr/bin/env bash
# The Triton kernels with the oldest, two middle and the newest Triton that is to work: interpreted, and compiled for chips
# that are not there. Run from anywhere, in an environment with the `test` extra; took nine to twelve minutes a version.
#     tests/triton_versions.sh [VERSION ...]      default: 3.3.1 3.6.0 3.7.1 and the newest
set -euo pipefail
exec < /dev/null

cd "$(dirname "${BASH_SOURCE[0]}")/.."
scratch="$(mktemp -d)"
trap 'status=$?; rm -rf "$scratch"; [ "$status" -eq 0 ] || echo "FAILED with status $status"' EXIT
versions=("$@")
[ "${#versions[@]}" -gt 0 ] || versions=(3.3.1 3.6.0 3.7.1 "")

for version in "${versions[@]}"; do
    printf '\n=== Triton %s\n' "${version:-newest}"
    # Ahead of what is installed. Before 3.7, Triton's interpreter needs a NumPy that still converts arrays of one element.
    numpy="numpy"
    [[ ! "$version" =~ ^3\.[0-6](\.|$) ]] || numpy="numpy<2.4"
    pip install --quiet --no-deps --target "$scratch/$version" "triton${version:+==$version}" "$numpy"
    export PYTHONPATH="$scratch/$version${PYTHONPATH:+:$PYTHONPATH}"
    export TRITON_CACHE_DIR="$scratch/cache/$version"
    python -c 'import triton, numpy; print("Triton", triton.__version__, "NumPy", numpy.__version__)'
    python -m pytest -q tests/test_triton_interpreter.py tests/test_triton_offline*.py
    export PYTHONPATH="${PYTHONPATH#"$scratch/$version"}"
    export PYTHONPATH="${PYTHONPATH#:}"
done
echo "TRITON VERSIONS PASSED"
