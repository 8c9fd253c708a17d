"""The options of the losses, checked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from . import _checks
from .criteria import Criterion, common_gamma, dice, lesion_free
from .kernels.layout import ACTIVATIONS, MASKINGS

REDUCTIONS = ("mean", "none", "sum")
INSTANCE_WEIGHTS = ("uniform", "inverse_size")
DICE = dice()
_MOST_INSTANCES = 2**24  # 64 MiB for each sum, sample and class

InstanceWeight = str | Callable[[Tensor], Tensor]


class Options(NamedTuple):
    """The options of a loss, checked once; ``BlobLoss`` and ``CCLoss`` document theirs."""

    criterion: Criterion = DICE
    main_criterion: Criterion | None = None
    main_weight: float = 1.0
    blob_weight: float = 1.0
    activation: str = "sigmoid"
    include_background: bool = False
    masking: str = "exclude"
    connectivity: int = 26
    reduction: str = "mean"
    ignore_index: int | None = None
    max_instances: int | None = None
    instance_weight: InstanceWeight = "uniform"
    empty_sample: float | None = None
    in_zones: bool = False  # whether it is a CC loss, which the rest is for
    spacing: Sequence[float] | None = None
    bidirectional: bool = False

    def checked(self) -> Options:
        """Return the options, or raise for the first that is wrong."""
        for name, criterion in (("criterion", self.criterion), ("main_criterion", self.main_criterion)):
            if not (isinstance(criterion, Criterion) or (name == "main_criterion" and criterion is None)):
                raise TypeError(
                    f"{name} must come from blobloss_fast.criteria, for example criteria.dice(); got "
                    f"{type(criterion).__name__}: blobloss_fast.compat takes arbitrary callables"
                )
        main_weight = _checks.number("main_weight", self.main_weight, minimum=0)
        blob_weight = _checks.number("blob_weight", self.blob_weight, minimum=0)
        if main_weight == blob_weight == 0:
            raise ValueError("main_weight and blob_weight must not both be 0: nothing would be left to learn from")
        _checks.one_of("activation", self.activation, ACTIVATIONS)
        _checks.flag("include_background", self.include_background)
        _checks.one_of("masking", self.masking, MASKINGS)
        _checks.one_of("connectivity", self.connectivity, (4, 8, 6, 18, 26))
        _checks.one_of("reduction", self.reduction, REDUCTIONS)
        ignore_index, max_instances = self.ignore_index, self.max_instances
        if ignore_index is not None:
            ignore_index = _checks.count("ignore_index", ignore_index, minimum=-(2**53), maximum=2**53)
        if max_instances is not None:
            max_instances = _checks.count("max_instances", max_instances, minimum=0, maximum=_MOST_INSTANCES)
        if not callable(self.instance_weight):
            _checks.one_of("instance_weight", self.instance_weight, INSTANCE_WEIGHTS)
        if self.empty_sample is not None:
            lesion_free(self.empty_sample)
        spacing = self.spacing
        if spacing is not None:
            _checks.spacing(spacing)
            spacing = tuple(spacing)  # an array has no simple comparison
        _checks.flag("bidirectional", self.bidirectional)
        common_gamma(self.criterion, self.main_criterion or self.criterion)
        return self.but(
            main_weight=main_weight,
            blob_weight=blob_weight,
            connectivity=int(self.connectivity),
            ignore_index=ignore_index,
            max_instances=max_instances,
            spacing=spacing,
        )

    def but(self, **changes: Any) -> Options:
        """Return the options with some changes: what _replace does, which PyTorch 2.7 cannot trace."""
        return Options(**{**{name: getattr(self, name) for name in _FIELDS}, **changes})

    @classmethod
    def named(cls, options: Mapping[str, Any]) -> Options:
        """Return checked options of a blob loss from keyword arguments."""
        unknown = sorted(options.keys() - set(BLOB_OPTIONS))
        if unknown:
            raise TypeError(f"unknown option {', '.join(unknown)}; the options are {', '.join(BLOB_OPTIONS)}")
        return cls(**options).checked()

    def empty_criterion(self) -> Criterion | None:
        """What stands for the instances of a sample that has none; None: what the loss says by itself."""
        return None if self.empty_sample is None else lesion_free(self.empty_sample)


_FIELDS = Options._fields
BLOB_OPTIONS = tuple(name for name in _FIELDS if name not in ("in_zones", "spacing", "bidirectional"))
CC_OPTIONS = tuple(name for name in _FIELDS if name not in ("masking", "in_zones"))
