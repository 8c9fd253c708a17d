"""What a launcher of Triton kernels needs, above all word of invalid input without a wait."""

from typing import ClassVar

import torch
from torch import Tensor

from .rows import rows as rows  # what the launchers need too


def compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def divide_up(a: int, b: int) -> int:
    """``triton.cdiv`` takes as long as a small launch."""
    return -(-a // b)


def padded_stats(num_features: int) -> int:
    """The count and the features, up to a power of two."""
    return 1 << num_features.bit_length()


def target_kind(target: Tensor | None, channels: int) -> str:
    if target is None:
        return "none"
    return "class_map" if target.shape[1] == 1 and channels > 1 else "binary"


class Invalid:
    """Something invalid in an earlier call on a device: known to the host without ever waiting for the device.

    ``flag`` lies in pinned memory, which kernels reach over the bus: they set it where they meet something invalid, and
    touch it nowhere else. They never clear it, so that no later call can hide what an earlier one met.
    """

    _per_device: ClassVar[dict[torch.device, "Invalid"]] = {}

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.inference_mode(False):  # made under inference mode, it could not be written outside it
            self.flag = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        self._seen = self.flag.numpy()  # the same memory, read past the dispatcher

    @classmethod
    def on(cls, device: torch.device) -> "Invalid":
        if device not in cls._per_device:
            cls._per_device.setdefault(device, cls(device))  # another thread may be as far
        return cls._per_device[device]

    def raise_if_seen(self) -> None:
        if not self._seen[0]:
            return
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not capturing:  # there nothing may wait, and the next call raises again
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # kernels under way would set the flag again after the reset
            self._seen[0] = 0
        raise RuntimeError(
            f"an earlier call on {self.device} returned NaN, because where it was not ignored it met an id beyond "
            "max_instances (a cell beyond num_cells), a target that is neither 0 nor 1 (or no class of the logits), "
            "or, with activation='none', a value outside [0, 1]: pass a larger max_instances (max_instances=None reads "
            "the largest id), threshold the target, name its ignored value with ignore_index, or pass probabilities; "
            "or nearest_instance met an id beyond int32: renumber the instances from 1"
        )
