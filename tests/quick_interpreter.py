"""Triton's interpreter without what it does about types and shapes again and again, which takes longer than the rest.

Never about values: these it computes as before. What a version of Triton does otherwise is left to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter


@contextmanager
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(interpreter.InterpretedFunction, "rewrite"):
            patch_the_language_once_per_launch(patch)
        leave_out_checks_that_nobody_reads(patch)
        keep_dtypes(patch)
        keep_shapes(patch)
        if hasattr(semantic, "TritonSemantic"):
            pass_equal_shapes_through(patch)
        yield


@pytest.fixture(autouse=True, scope="module")  # by each file that imports it: of the session, it would come in layers
def quick_interpreter() -> Iterator[None]:
    with quick():
        yield


def patch_the_language_once_per_launch(patch: pytest.MonkeyPatch) -> None:
    """And not at every call of a device function."""
    function, launcher = interpreter.InterpretedFunction, interpreter.GridExecutor
    call, launch, patched = function.__call__, launcher.__call__, set()

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def call_patched(self, *args, **kwargs):
        module = id(self.fn.__globals__)
        if module in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(module)
        return call(self, *args, **kwargs)

    patch.setattr(launcher, "__call__", launch_anew)
    patch.setattr(function, "__call__", call_patched)


def leave_out_checks_that_nobody_reads(patch: pytest.MonkeyPatch) -> None:
    """Every sum of integers is made in int64 too, for an assertion that without ``debug`` is not made."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


def keep_dtypes(patch: pytest.MonkeyPatch) -> None:
    """NumPy's dtype for one of Triton's."""
    find, known = interpreter._get_np_dtype, {}

    def dtype_of(dtype):
        found = known.get(dtype.name)
        if found is None:
            found = known[dtype.name] = find(dtype)
        return found

    patch.setattr(interpreter, "_get_np_dtype", dtype_of)


def keep_shapes(patch: pytest.MonkeyPatch) -> None:
    """The attributes of a type of blocks, with one object for a shape, and the shape of a tensor of such a type."""
    block_type, tensor = tl.block_type.__init__, tl.tensor.__init__
    types, shapes, of_tensors = {}, {}, {}

    def new_type(self, element_ty, shape):
        key = element_ty.name, tuple(shape)
        if key not in types:
            block_type(self, element_ty, shape)
            self.shape = shapes.setdefault(tuple(self.shape), self.shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    def new_tensor(self, handle, type):
        key = id(type.shape) if type.is_block() else None
        if key not in of_tensors:
            tensor(self, handle, type)
            of_tensors[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensors[key]

    patch.setattr(tl.block_type, "__init__", new_type)
    patch.setattr(tl.tensor, "__init__", new_tensor)


def pass_equal_shapes_through(patch: pytest.MonkeyPatch) -> None:
    """Blocks of the same shape are not compared axis by axis before they are left as they are."""
    broadcast = semantic.TritonSemantic.broadcast_impl_value

    def same_or_broadcast(self, lhs, rhs):
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    patch.setattr(semantic.TritonSemantic, "broadcast_impl_value", same_or_broadcast)
