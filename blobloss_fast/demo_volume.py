"""Reads the demo's volume, and says in one line what is wrong with a file that cannot be used."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class DemoError(Exception):
    """Something the user can put right; shown as one line."""


@dataclass(frozen=True)
class Volume:
    name: str
    label: NDArray[Any]
    image: NDArray[Any] | None  # first channel
    instances: NDArray[Any] | None
    spacing: tuple[float, ...]
    note: str = ""


def read_volume(file: Path | None, image: Path | None = None) -> Volume:
    """Reads FILE (None: the sample) and checks everything that the demo relies on."""
    if file is None:
        if image is not None:
            raise DemoError("--image belongs to a NIfTI label: blobloss-fast label.nii.gz --image image.nii.gz")
        sample = Path(str(files("blobloss_fast"))) / "data" / "ms_lesions.npz"
        return check_volume(read_npz(sample, "sample (multiple sclerosis lesions, FLAIR)"))
    if not file.is_file():
        raise DemoError(
            f"{file}: expected an .npz with `image` and `label` or a NIfTI label (.nii, .nii.gz); no such file"
        )
    if file.name.endswith((".nii", ".nii.gz")):
        return check_volume(read_nifti(file, image))
    if image is not None:
        raise DemoError(f"--image belongs to a NIfTI label (.nii, .nii.gz), but FILE is {file}")
    return check_volume(read_npz(file, str(file)))


def read_npz(file: Path, name: str) -> Volume:
    expected = f"{file}: expected an .npz with the arrays `image` and `label`"
    try:
        with file.open("rb") as stream:  # opened here: np.load leaves the file of a broken archive open
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DemoError(f"{expected}; this is a single array")
            found = archive.files
            if "label" not in found:
                raise DemoError(f"{expected}; found {', '.join(sorted(found)) or 'nothing'}")
            arrays = {key: archive[key] for key in ("label", "image", "instances", "spacing") if key in found}
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        raise DemoError(f"{expected}; this is not an .npz file, or a broken one") from None
    label = arrays["label"]
    spacing = arrays.get("spacing", np.ones(0))
    image, note = arrays.get("image"), ""
    if image is not None and image.ndim == label.ndim + 1 and len(image):
        note = f"image channel 0 of {len(image)}; " if len(image) > 1 else ""
        image = image[0]
    return Volume(name, label, image, arrays.get("instances"), spacing_of(spacing), note)


def spacing_of(array: NDArray[Any]) -> tuple[float, ...]:
    return tuple(float(size) for size in array.ravel()) if array.dtype.kind in "uif" else ()


def read_nifti(file: Path, image_file: Path | None) -> Volume:
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
    except ModuleNotFoundError:
        raise DemoError(f'{file}: reading NIfTI needs nibabel: pip install "blobloss_fast[demo]"') from None

    def read(path: Path) -> tuple[NDArray[Any], tuple[float, ...]]:
        try:
            volume: Any = nibabel.load(path)
            array = np.asanyarray(volume.dataobj)
            spacing = tuple(float(size) for size in volume.header.get_zooms())
        except (OSError, ValueError, EOFError, AttributeError, zlib.error, ImageFileError) as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else "this is not one, or a broken one"
            raise DemoError(f"{path}: expected a NIfTI file; {reason}") from None
        while array.ndim > 3 and array.shape[-1] == 1:
            array = array[..., 0]
        return array, spacing

    label, spacing = read(file)
    image, note = (None, "") if image_file is None else (read(image_file)[0], "")
    if image is not None and image.ndim == label.ndim + 1:
        image, note = image[..., 0], f"image channel 0 of {image.shape[-1]}; "
    return Volume(str(file), label, image, None, spacing[: label.ndim], note)


def check_volume(volume: Volume) -> Volume:
    label, image, instances, name = volume.label, volume.image, volume.instances, volume.name
    if label.ndim not in (2, 3):
        raise DemoError(f"{name}: expected a label with 2 or 3 axes; got shape {list(label.shape)}")
    if label.dtype.kind not in "buif":
        raise DemoError(f"{name}: expected a label of numbers 0 and 1; got dtype {label.dtype}")
    values = np.unique(label)
    if not np.isin(values, (0, 1)).all():
        some = ", ".join(f"{value:g}" for value in values[:5]) + (", ..." if len(values) > 5 else "")
        raise DemoError(f"{name}: expected a binary label (0 background, 1 lesion); found the values {some}")
    if not label.any():
        raise DemoError(f"{name}: expected a label with at least one lesion voxel; found none")
    if image is not None:
        if image.shape != label.shape:
            raise DemoError(
                f"{name}: expected an image of the label's shape {list(label.shape)}, with or without a channel axis; "
                f"got {list(image.shape)}"
            )
        if image.dtype.kind not in "buif" or not np.isfinite(image).all() or image.min() == image.max():
            raise DemoError(f"{name}: expected an image of finite numbers that is not constant")
    if instances is not None:
        if instances.shape != label.shape or instances.dtype.kind not in "bui":
            raise DemoError(
                f"{name}: expected integer `instances` of the label's shape {list(label.shape)}; "
                f"got {instances.dtype} {list(instances.shape)}"
            )
        if instances.min() < 0 or not instances.any():
            raise DemoError(f"{name}: expected `instances` with 0 for background and at least one id above 0")
    spacing = volume.spacing if len(volume.spacing) == label.ndim and min(volume.spacing) > 0 else (1.0,) * label.ndim
    return Volume(name, label.astype(bool), image, instances, spacing, volume.note)
