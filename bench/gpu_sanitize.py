"""Small cases of every kernel, for compute-sanitizer: `compute-sanitizer --tool memcheck python -m bench.gpu_sanitize`.

Sizes are odd and volumes are not aligned to anything. Set PYTORCH_NO_CUDA_MEMORY_CACHING=1: PyTorch's cache would
otherwise hide what is outside of a tensor, or left in it from another.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from blobloss_fast import BlobLoss, CCLoss, connected_components, criteria, nearest_instance

SHAPES = ((7, 5, 3), (33, 9, 41))
DTYPES = (torch.float32, torch.bfloat16)
CAPACITY = 400


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Names and functions that return something finite."""
    generator = torch.Generator().manual_seed(0)
    compound = criteria.dice() + criteria.bce() + criteria.focal()
    one = torch.ones(1, 1, 1, 1, 1, device=device)
    yield "one voxel", partial(gradient_sum, BlobLoss(max_instances=1), logits=one, instances=one.int())
    yield "one voxel, mask", partial(gradient_sum, BlobLoss(max_instances=1), logits=one, target=one)
    for shape in SHAPES:
        volume = (2, 2, *shape)
        logits = torch.randn(volume, generator=generator).to(device)
        ids = torch.randint(-1, 6, volume, generator=generator).to(device)
        mask = (torch.rand(volume, generator=generator) < 0.2).to(device)
        for dtype in DTYPES:
            step = partial(gradient_sum, logits=logits.to(dtype))
            yield f"{shape}, {dtype}, ids", partial(step, BlobLoss(max_instances=5), instances=ids)
            yield f"{shape}, {dtype}, mask", partial(step, BlobLoss(max_instances=CAPACITY), target=mask)
        step = partial(gradient_sum, logits=logits)
        own = {"target": mask.float(), "instances": ids}
        yield f"{shape}, compound, own target", partial(step, BlobLoss(compound, max_instances=5), **own)
        weighted = BlobLoss(instance_weight="inverse_size", max_instances=5)
        yield f"{shape}, weighted", partial(step, weighted, instances=ids)
        softmax = BlobLoss(compound, activation="softmax", max_instances=CAPACITY)
        yield f"{shape}, softmax of a class map", partial(step, softmax, target=mask[:, :1].long())
        three = torch.cat([logits, logits[:, :1] * logits[:, 1:]], 1)
        classes = mask.sum(1, keepdim=True)
        yield f"{shape}, softmax of three classes", partial(gradient_sum, softmax, logits=three, target=classes)
        zones = CCLoss(compound, max_instances=CAPACITY, bidirectional=True)
        yield f"{shape}, zones", partial(step, zones, target=mask)
        strided = logits.transpose(2, 4).contiguous().transpose(2, 4)
        yield f"{shape}, strided", partial(gradient_sum, BlobLoss(max_instances=5), logits=strided, instances=ids)
        for connectivity in (6, 18, 26):
            yield f"{shape}, components, {connectivity}", partial(label_sum, mask, connectivity)
        yield f"{shape}, zones of ids", partial(zone_sum, ids)
    # Programs of the forward pass with several blocks.
    volume = (1, 3, 2, 600, 1031)
    logits = torch.randn(volume, generator=generator).to(device)
    ids = torch.randint(-30, 6, volume, generator=generator).to(device)
    for activation in ("sigmoid", "softmax"):
        loss = BlobLoss(activation=activation, max_instances=5)
        yield f"several blocks, {activation}", partial(gradient_sum, loss, logits=logits, instances=ids)
    yield "ids below 0 alone", partial(zone_sum, torch.full((1, 1, 3, 4, 5), -1, device=device))
    for number in (0, 1):
        full = torch.full((1, 1, 9, 10, 11), number, device=device)
        yield f"mask of {number}", partial(label_sum, full, 26)


def gradient_sum(loss: BlobLoss | CCLoss, logits: Tensor, **labels: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, **labels)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach() + gradient.float().sum()


def label_sum(mask: Tensor, connectivity: int) -> Tensor:
    labels, counts = connected_components(mask, connectivity)
    return labels.sum() + counts.sum()


def zone_sum(ids: Tensor) -> Tensor:
    return nearest_instance(ids).sum()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_sanitize", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", type=torch.device)
    device = parser.parse_args(arguments).device
    count = 0
    for count, (name, function) in enumerate(cases(device), start=1):  # noqa: B007
        if not function().isfinite():
            raise SystemExit(f"{name}: not finite")
    print(f"{count} cases")


if __name__ == "__main__":
    main()
