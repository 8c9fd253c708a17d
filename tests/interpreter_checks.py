"""What the files have in common that are run in Triton's interpreter: without it they skip."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 must be set before Triton is imported", allow_module_level=True)

# The interpreter computes with numpy, which warns of log(0) and of inf - inf; the kernels do both and select.
# Triton 3.3 converts arrays of one element, which NumPy deprecates (and from 2.4 on refuses).
MARKS = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
