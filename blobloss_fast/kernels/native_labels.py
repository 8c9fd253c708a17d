"""Connected components by the native library (csrc/connected_components.cpp), whose truth and fallback is ``labels``.

One call reads the target as it is, checks its values, and counts the instances of all samples and channels; another
writes their ids, which may take two bytes rather than four where that is enough for their number.
"""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from . import labels, native, structs
from .layout import NOT_A_CLASS, NOT_BINARY

# The types of a target that the library reads; all others are for NumPy.
DTYPES = (torch.float32, torch.float64, torch.bool, *structs.INTEGERS)
_LABELLING = struct.Struct("@PqqiiP6q4iqP")
_DIFFERING_AXES = {4: 1, 6: 1, 8: 2, 18: 2, 26: 3}  # in how many of them the places of two neighbours may differ
_STATUS = {2: NOT_BINARY, 4: NOT_A_CLASS}
_NO_MEMORY = 16


def connected_components(mask: Tensor, connectivity: int) -> tuple[Tensor, Tensor]:
    """Label every sample and channel of a binary mask alone; see ``labels.connected_components``."""
    return label_target(mask, mask.shape[1], False, False, connectivity, None)


def label_target(
    target: Tensor,
    channels: int,
    class_map: bool,
    softmax: bool,
    connectivity: int,
    ignore: int | None,
    narrow: bool = False,
) -> tuple[Tensor, Tensor]:
    """Find the instances of a target; see ``labels.label_target``. If ``narrow``, ids are int16 where that will do."""
    if target.dtype not in DTYPES:
        return labels.label_target(target, channels, class_map, softmax, connectivity, ignore)
    batch, own, *spatial = target.shape
    expected = 1 if class_map else channels
    if own != expected:
        raise ValueError(
            f"target must have {expected} channel(s) with class_map={class_map}; got {list(target.shape)}: a class map "
            "has one, a binary target as many as the logits"
        )
    returned = 1 if softmax and channels == 2 else channels
    counts = torch.empty(batch, returned, dtype=torch.int64, device="cpu")  # whatever the default device is
    if not target.numel():
        return torch.empty(batch, returned, *spatial, dtype=torch.int32, device="cpu"), counts.zero_()
    _kept, volume = structs.volume("target", target, DTYPES, batch, channels, target.numel() // (batch * own))
    axes = [size for size in spatial if size > 1]  # the others change neither the order nor the neighbours
    library, found, ids = native._library(), ctypes.c_void_p(), None
    try:
        status = library.find_components(
            _LABELLING.pack(
                *volume,
                counts.data_ptr(),
                batch,
                channels,
                *(1,) * (3 - len(axes)),
                *axes,
                0 if ignore is None else ignore,
                ignore is not None,
                class_map,
                softmax,
                _DIFFERING_AXES[connectivity],
                *native._threads(),
            ),
            ctypes.byref(found),
        )
        if status:
            _raise(status)
        few = narrow and int(counts.max()) <= torch.iinfo(torch.int16).max
        ids = torch.empty(batch, returned, *spatial, dtype=torch.int16 if few else torch.int32, device="cpu")
    finally:
        if found:  # is freed, with or without ids
            library.write_components(found, *(0, 0) if ids is None else (ids.data_ptr(), structs.TYPES[ids.dtype]))
    return ids, counts


def _raise(status: int) -> None:
    if status & _NO_MEMORY:
        raise MemoryError("the native library got no memory to label a volume of this size: label smaller parts of it")
    for bit, message in _STATUS.items():
        if status & bit:
            raise ValueError(message)
    raise ValueError(
        "mask (or target) must have fewer than 2^31 stretches of foreground along its last axis in every sample and "
        "channel, since ids are int32: label smaller parts of it"
    )
