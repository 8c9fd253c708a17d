"""The native kernels' sigmoid and softplus at every one of the 2^32 floats, on every instruction set of this machine.

Takes half an hour or so, and is no part of CI: test_native_math.py takes every 2003rd float, and defines what an ulp is
and what is true. From the root of the repository:

    python -m tests.native_exhaustive [STEP]

STEP takes one of that many runs of 65,536 floats. Prints the worst error of each function and where it is; ends with
status 1 if one is above two ulp.
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np

from blobloss_fast.kernels import native

from .test_native_math import TRUTH, ULPS, evaluate, ulps

RUN = 2**16


def worst_errors(library: ctypes.CDLL, sets: list[str], step: int) -> dict[tuple[str, str], tuple[float, np.float32]]:
    """(ulp, x) by instruction set and feature."""
    worst = {(name, feature): (-1.0, np.float32(0)) for name in sets for feature in TRUTH}
    for first in range(0, 2**32, step * RUN):
        x = np.arange(first, first + RUN, dtype=np.uint64).astype(np.uint32).view(np.float32)
        with np.errstate(invalid="ignore"):  # signalling NaN
            z = x.astype(np.float64)
        for feature, (truth, _) in TRUTH.items():
            expected = truth(z)
            for name in sets:
                library.blobloss_use_isa(name.encode())
                error = ulps(evaluate(library, feature, x)[0], expected)
                at = int(error.argmax())
                worst[name, feature] = max(worst[name, feature], (float(error[at]), x[at]), key=lambda found: found[0])
        if first % 2**28 == 0:
            print(f"{first / 2**32:.0%}", end="\r", file=sys.stderr, flush=True)
    return worst


def main() -> int:
    """Print the worst errors; return whether one is too large."""
    library = ctypes.CDLL(str(native.PATH))
    sets = [name for name in ("baseline", "avx2", "avx512") if library.blobloss_use_isa(name.encode())]
    worst = worst_errors(library, sets, int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    for (name, feature), (error, x) in worst.items():
        print(f"{name:8} {feature:7} {error:.3f} ulp at {float(x):.9g} ({x.view(np.uint32):#010x})")
    return int(max(error for error, _ in worst.values()) > ULPS)


if __name__ == "__main__":
    sys.exit(main())
