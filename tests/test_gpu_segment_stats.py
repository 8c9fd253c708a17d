"""The table of sums and its gradient on a CUDA device: tests of test_segment_stats.py, with the Triton kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from . import test_segment_stats as kernel_tests

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda")


class OnDevice:
    """The Triton kernels, called with tensors of the CPU in the strides they have there."""

    def __init__(self) -> None:
        from blobloss_fast.kernels import triton_segment_stats

        self._kernels = triton_segment_stats

    def segment_stats_forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        counts, sums = self._kernels.segment_stats_forward(*map(with_strides, arguments))
        return counts.cpu(), sums.cpu()

    def segment_stats_backward(self, *arguments: Any) -> Tensor:
        return self._kernels.segment_stats_backward(*map(with_strides, arguments)).cpu()


def with_strides(argument: Any) -> Any:
    """A tensor on the device with all of its storage; anything else as it is."""
    if not isinstance(argument, Tensor):
        return argument
    storage = torch.empty(0, dtype=argument.dtype).set_(argument.untyped_storage()).to(DEVICE)
    return storage.as_strided(argument.shape, argument.stride(), argument.storage_offset())


@pytest.fixture
def backend() -> OnDevice:
    return OnDevice()


@pytest.mark.slow
class TestKernels:
    """Those that need few compilations."""

    test_dtypes_of_targets = staticmethod(kernel_tests.test_dtypes_of_targets)
    test_expanded_input = staticmethod(kernel_tests.test_expanded_input)
    test_extreme_logits = staticmethod(kernel_tests.test_extreme_logits)
    test_ignored_voxels = staticmethod(kernel_tests.test_ignored_voxels_are_not_read_and_get_no_gradient)
    test_infinite_logits_of_a_softmax = staticmethod(kernel_tests.test_infinite_logits_of_a_softmax)
    test_integer_dtypes_of_ids = staticmethod(kernel_tests.test_integer_dtypes_of_ids)
    test_lower_precision = staticmethod(kernel_tests.test_lower_precision_is_computed_in_fp32)
    test_nan = staticmethod(kernel_tests.test_nan_poisons_its_cell_and_its_voxel_only)
    test_one_map_of_ids = staticmethod(kernel_tests.test_one_map_of_ids_for_all_channels)
    test_probabilities = staticmethod(kernel_tests.test_probabilities_of_exactly_0_and_1)
    test_rows = staticmethod(kernel_tests.test_rows_that_need_padding_count_every_voxel_once)
    test_strides = staticmethod(kernel_tests.test_strides)
