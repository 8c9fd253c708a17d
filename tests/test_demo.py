"""The demo: its numbers against closed forms in NumPy, its picture, its sample, and what it says to wrong files."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from scipy import ndimage

from blobloss_fast import demo, demo_picture, demo_volume

SMOOTH = 1e-5
NEIGHBOURS = {2: np.ones((3, 3)), 3: np.ones((3, 3, 3))}


def blobs_2d():
    """25 bars of 1 to 25 voxels."""
    label = np.zeros((60, 80), np.uint8)
    for k in range(25):
        label[2 : 3 + k, 2 + 3 * k] = 1
    image = np.random.default_rng(1).normal(size=label.shape) + 3 * label
    return {"label": label, "image": image.astype(np.float32)}


def crop_3d():
    """A corner of the sample with one large and several small lesions."""
    volume = demo_volume.read_volume(None)
    cut = (slice(76, 112), slice(88, 128), slice(4, 16))
    return {"label": volume.label[cut].astype(np.uint8), "image": volume.image[cut]}


def save(path, arrays):
    np.savez(path, **arrays)
    return path


def expected(logits, label, ids):
    """Losses per lesion and every voxel's gradient of Dice, the blob term and the zones' term: closed forms in fp64."""
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    slope, present = p * (1 - p), np.unique(ids[ids > 0])
    top, whole = 2 * (p * label).sum() + SMOOTH, p.sum() + label.sum() + SMOOTH
    dice, of_dice = 1 - top / whole, slope * (top / whole**2 - 2 * label / whole)
    losses, of_blob, of_cc = [], np.zeros_like(p), np.zeros_like(p)
    nearest = present[np.argmin([ndimage.distance_transform_edt(ids != k) for k in present], 0)]  # the first of several
    for k in present:
        blob, domain = ids == k, (ids == k) | (ids == 0)
        top, size = 2 * p[blob].sum() + SMOOTH, p[domain].sum() + blob.sum() + SMOOTH
        losses.append(1 - top / size)
        of_blob += domain * slope * (top / size**2 - 2 * blob / size) / len(present)
        size = p[nearest == k].sum() + blob.sum() + SMOOTH
        of_cc += (nearest == k) * slope * (top / size**2 - 2 * blob / size) / len(present)
    gradients = {"dice": of_dice, "blob": of_blob, "cc": of_cc, "both": of_dice + of_blob}
    return present, np.array(losses), dice, gradients


def shares_of(gradient, ids, present):
    return np.array([np.abs(gradient[ids == k]).sum() for k in present]) / np.abs(gradient).sum()


def as_batch(array, dtype):
    return torch.from_numpy(np.ascontiguousarray(array).astype(dtype))[None, None]


def table_rows(output):
    """Cells of the rows that end in three shares: lesion, voxels, [loss,] Dice share, blob share, CC share."""
    rows = {}
    for line in output.splitlines():
        cells = line.replace(" %", "%").split()
        if len(cells) > 4 and all(cell.endswith("%") for cell in cells[-3:]):
            rows[" ".join(cells[: -4 if cells[0] == "background" else -5])] = cells[-5:]
    return rows


def parsed(cell):
    return float(cell.rstrip("%")) / 100


@pytest.mark.parametrize("scene", [crop_3d, blobs_2d])
def test_measured_values_match_closed_forms(scene, tmp_path):
    volume = demo_volume.read_volume(save(tmp_path / "v.npz", scene()))
    logits, _ = demo.stand_in(volume)
    ids = ndimage.label(volume.label, structure=NEIGHBOURS[volume.label.ndim])[0]
    present, losses, dice, gradients = expected(logits, volume.label, ids)
    found = demo.measure(*(as_batch(a, t) for a, t in ((logits, np.float32), (volume.label, np.float32), (ids, int))))
    np.testing.assert_array_equal(found.ids, present)
    np.testing.assert_array_equal(found.voxels, np.bincount(ids.ravel())[1:])
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    np.testing.assert_allclose([found.main, found.blob], [dice, losses.mean()], rtol=1e-5)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(found.shares[name], shares_of(gradient, ids, present), rtol=1e-4)
        np.testing.assert_allclose(found.background[name] + found.shares[name].sum(), 1, rtol=1e-12)
        np.testing.assert_allclose(
            found.gradients[name], np.abs(gradient), rtol=1e-4, atol=1e-5 * np.abs(gradient).max()
        )


def test_the_loop_is_the_loss_it_claims_to_be(tmp_path):
    volume = demo_volume.read_volume(save(tmp_path / "v.npz", crop_3d()))
    ids = ndimage.label(volume.label, structure=NEIGHBOURS[3])[0]
    logits, _ = demo.stand_in(volume)
    present, losses, dice, gradients = expected(logits, volume.label, ids)
    x = as_batch(logits, np.float64).requires_grad_()
    seen = []
    value = demo.loop_loss(
        x, as_batch(volume.label, np.float64), as_batch(ids, int), present.tolist(), lambda: seen.append(1)
    )
    assert len(seen) == len(present)
    np.testing.assert_allclose(value.item(), dice + losses.mean(), rtol=1e-10)
    np.testing.assert_allclose(x.grad[0, 0].numpy(), gradients["both"], rtol=1e-8, atol=1e-14)


def test_table_and_picture_of_a_3d_crop(tmp_path, capsys):
    file = save(tmp_path / "v.npz", crop_3d())
    assert demo.main([str(file), "--out", str(tmp_path / "new" / "folder")]) == 0
    output = capsys.readouterr().out
    volume = demo_volume.read_volume(file)
    ids = ndimage.label(volume.label, structure=NEIGHBOURS[3])[0]
    present, losses, dice, gradients = expected(demo.stand_in(volume)[0], volume.label, ids)
    assert f"{len(present)} lesions" in output
    assert f"Dice loss {dice:.3f}" in output
    assert "a stand-in, not a network" in output and "agree" in output
    of_dice, of_blob, of_cc = (shares_of(gradients[name], ids, present) for name in ("dice", "blob", "cc"))
    rows = table_rows(output)
    assert set(rows) == {"background", *(str(k) for k in present)}
    for i, k in enumerate(present):
        voxels, loss, dice_share, blob_share, cc_share = rows[str(k)]
        assert int(voxels.replace(",", "")) == (ids == k).sum()
        assert float(loss) == pytest.approx(losses[i], abs=6e-4)
        for cell, share in ((dice_share, of_dice[i]), (blob_share, of_blob[i]), (cc_share, of_cc[i])):
            if not cell.startswith("<"):
                assert parsed(cell) == pytest.approx(share, rel=6e-3)
    assert parsed(rows["background"][-3]) == pytest.approx(1 - of_dice.sum(), rel=6e-3)
    for name in ("literal loop", "plain Dice loss", "BlobLoss()"):
        line = next(
            line for line in output.splitlines() if line.strip().startswith(name) and line.rstrip()[-1].isdigit()
        )
        assert all(float(cell) > 0 for cell in line.split()[-4:])
    assert demo.CREDIT not in output
    assert_picture(tmp_path / "new" / "folder" / demo.PICTURE)


def assert_picture(path):
    pixels = imread(path)[..., :3]
    assert pixels.shape[1] == 1400
    assert pixels.std() > 0.1
    grey = np.ptp(pixels, axis=-1) < 0.02
    assert 0.02 < 1 - grey.mean() < 0.9  # colour, but not everywhere
    third = pixels.shape[1] // 3
    for k in range(3):  # each map: not one flat colour
        assert pixels[100 : pixels.shape[0] // 3, k * third + 60 : (k + 1) * third - 60].std() > 0.05


def test_long_table_leaves_the_middle_out_and_adds_it_up(tmp_path, capsys):
    file = save(tmp_path / "v.npz", blobs_2d())
    assert demo.main([str(file), "--out", str(tmp_path)]) == 0
    rows = table_rows(capsys.readouterr().out)
    volume = demo_volume.read_volume(file)
    ids = ndimage.label(volume.label, structure=NEIGHBOURS[2])[0]
    present, losses, _, gradients = expected(demo.stand_in(volume)[0], volume.label, ids)
    assert len(rows) == 2 * demo.ROWS + 2
    sizes, loss, of_dice, of_blob, _ = rows["9 left out"]
    middle = np.isin(np.bincount(ids.ravel())[1:], range(9, 18))  # sizes 1 to 25, eight shown at either end
    assert sizes == "9-17"
    assert float(loss) == pytest.approx(losses[middle].mean(), abs=6e-4)
    assert parsed(of_dice) == pytest.approx(shares_of(gradients["dice"], ids, present)[middle].sum(), rel=6e-3)
    assert parsed(of_blob) == pytest.approx(shares_of(gradients["blob"], ids, present)[middle].sum(), rel=6e-3)
    assert_picture(tmp_path / demo.PICTURE)


def test_instances_of_the_file_are_used(tmp_path):
    arrays = crop_3d()
    ids = ndimage.label(arrays["label"], structure=NEIGHBOURS[3])[0]
    merged = np.where(ids > 2, 7, ids).astype(np.uint16)  # a gap, and one lesion of several parts
    volume = demo_volume.read_volume(save(tmp_path / "v.npz", {**arrays, "instances": merged}))
    logits, _ = demo.stand_in(volume)
    _, losses, _, _ = expected(logits, volume.label, merged)
    found = demo.measure(
        *(as_batch(a, t) for a, t in ((logits, np.float32), (volume.label, np.float32), (volume.instances, int)))
    )
    assert found.ids.tolist() == [1, 2, 7]
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)


def test_no_time_is_shown_where_loop_and_ours_disagree(tmp_path, capsys, monkeypatch):
    class Wrong(demo.BlobLoss):
        def forward(self, *arguments):
            return 1.001 * super().forward(*arguments)

    monkeypatch.setattr(demo, "BlobLoss", Wrong)
    with pytest.raises(RuntimeError, match="disagree, so no time is shown"):
        demo.main([str(save(tmp_path / "v.npz", crop_3d())), "--out", str(tmp_path)])
    assert "median ms" not in capsys.readouterr().out


@pytest.mark.parametrize("sign", [1, -1])
def test_stand_in_from_an_image_is_the_same_every_time_and_finds_bright_or_dark_lesions(sign):
    arrays = blobs_2d()
    volume = demo_volume.Volume("v", arrays["label"].astype(bool), sign * arrays["image"], None, (1.0, 1.0))
    logits, how = demo.stand_in(volume)
    np.testing.assert_array_equal(logits, demo.stand_in(volume)[0])
    assert logits.dtype == np.float32
    assert np.abs(logits).max() == demo.LOGIT_LIMIT
    assert (logits >= 0).sum() == volume.label.sum() // 2  # cut at half the label's volume
    assert logits[volume.label].mean() > logits[~volume.label].mean() + 2
    assert "image" in how


def test_stand_in_without_an_image_has_errors_of_both_kinds():
    volume = demo_volume.Volume("v", demo_volume.read_volume(None).label, None, None, (1.0, 1.0, 1.0))
    logits, how = demo.stand_in(volume)
    np.testing.assert_array_equal(logits, demo.stand_in(volume)[0])
    found = logits > 0
    assert (found & volume.label).sum() > 0.5 * volume.label.sum()
    assert (found & ~volume.label).any()
    assert (~found & volume.label).any()
    assert "label" in how


def test_nifti_with_and_without_image(tmp_path, capsys):
    arrays = crop_3d()
    affine = np.diag([0.5, 2.0, 3.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(arrays["label"], affine), tmp_path / "label.nii.gz")
    channels = np.stack([arrays["image"], 255 - arrays["image"]], -1)
    nibabel.save(nibabel.Nifti1Image(channels, affine), tmp_path / "image.nii")
    volume = demo_volume.read_volume(tmp_path / "label.nii.gz", tmp_path / "image.nii")
    np.testing.assert_array_equal(volume.label, arrays["label"] == 1)
    np.testing.assert_array_equal(volume.image, arrays["image"])
    assert volume.spacing == (0.5, 2.0, 3.0)
    assert "channel 0 of 2" in volume.note
    assert demo.main([str(tmp_path / "label.nii.gz"), "--out", str(tmp_path)]) == 0
    assert "there is no image" in capsys.readouterr().out
    assert_picture(tmp_path / demo.PICTURE)


def test_npz_with_channels_and_spacing(tmp_path):
    arrays = crop_3d()
    channels = {**arrays, "image": np.stack([arrays["image"]] * 3), "spacing": np.array([1, 2, 3])}
    volume = demo_volume.read_volume(save(tmp_path / "v.npz", channels))
    np.testing.assert_array_equal(volume.image, arrays["image"])
    assert volume.spacing == (1.0, 2.0, 3.0)
    assert "channel 0 of 3" in volume.note


def test_slice_with_the_most_lesions():
    ids = np.zeros((4, 4, 3), int)
    ids[0, :, 0], ids[0, 0, 2], ids[2, 2, 2] = 1, 1, 5
    assert demo_picture.busiest_slice(ids) == (slice(None), slice(None), 2)


def wrong_files():
    good = blobs_2d()
    ones = np.ones((6, 6))
    npz = "expected an .npz with the arrays `image` and `label`"
    yield "not_there.npz", None, "no such file"
    yield "text.npz", b"not a zip", npz
    yield "cut.npz", b"PK\x03\x04 and nothing more", npz
    yield "empty.npz", b"", npz
    yield "array.npz", np.zeros(3), "this is a single array"
    yield "no_label.npz", {"image": good["image"], "mask": good["label"]}, "found image, mask"
    yield "pickled.npz", {"label": np.array([{}, None], dtype=object)}, npz
    yield "classes.npz", {"label": 2 * good["label"]}, "expected a binary label .* found the values 0, 2"
    yield "soft.npz", {"label": 0.25 * good["label"]}, "found the values 0, 0.25"
    yield "nan.npz", {"label": np.full((6, 6), np.nan)}, "found the values nan"
    yield "none.npz", {"label": 0 * good["label"]}, "at least one lesion voxel; found none"
    yield "words.npz", {"label": np.array([["a", "b"]])}, "expected a label of numbers"
    yield "line.npz", {"label": np.ones(6)}, r"2 or 3 axes; got shape \[6\]"
    yield "batch.npz", {"label": np.ones((1, 1, 2, 2))}, r"2 or 3 axes; got shape \[1, 1, 2, 2\]"
    yield "shapes.npz", {**good, "image": good["image"][:, 1:]}, r"label's shape \[60, 80\].*got \[60, 79\]"
    yield "channels.npz", {**good, "image": good["image"][..., None]}, r"label's shape \[60, 80\].*got \[80, 1\]"
    yield "flat.npz", {"label": np.eye(6), "image": ones}, "not constant"
    yield "inf.npz", {"label": np.eye(6), "image": ones * np.inf}, "finite numbers"
    yield "ids.npz", {**good, "instances": good["label"][1:]}, r"integer `instances` of the label's shape"
    yield "float_ids.npz", {**good, "instances": good["image"]}, "integer `instances` .* got float32"
    yield "no_ids.npz", {**good, "instances": 0 * good["label"]}, "at least one id above 0"
    yield "negative.npz", {**good, "instances": -good["label"].astype(int)}, "0 for background"
    yield "text.nii", b"not a volume", "expected a NIfTI file"
    yield "text.nii.gz", b"not a volume", "expected a NIfTI file"


def assert_refused(capsys, arguments, message):
    """Exit 2, nothing on standard output, one line on standard error."""
    assert demo.main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("blobloss-fast: ")
    assert printed.err.count("\n") == 1
    assert re.search(message, printed.err), printed.err


@pytest.mark.parametrize(("name", "content", "message"), [pytest.param(*case, id=case[0]) for case in wrong_files()])
def test_wrong_file(name, content, message, tmp_path, capsys):
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, dict):
        save(file, content)
    elif content is not None:
        with file.open("wb") as stream:
            np.save(stream, content)
    assert_refused(capsys, [file, "--out", tmp_path], message)
    assert not (tmp_path / demo.PICTURE).exists()


def test_wrong_nifti_image(tmp_path, capsys):
    label = tmp_path / "label.nii"
    nibabel.save(nibabel.Nifti1Image(crop_3d()["label"], np.eye(4)), label)
    image = tmp_path / "image.nii"
    assert_refused(capsys, [label, "--image", image], "image.nii: expected a NIfTI file; no such file")
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5), np.float32), np.eye(4)), image)
    assert_refused(capsys, [label, "--image", image], r"got \[3, 4, 5\]")
    assert_refused(capsys, ["--image", image], "--image belongs to a NIfTI label")
    assert_refused(capsys, [save(tmp_path / "v.npz", blobs_2d()), "--image", image], "--image belongs to a NIfTI label")


def test_nifti_cut_short(tmp_path, capsys):
    for name in ("label.nii", "label.nii.gz"):
        file = tmp_path / name
        nibabel.save(nibabel.Nifti1Image(crop_3d()["label"], np.eye(4)), file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        assert_refused(capsys, [file], "expected a NIfTI file; this is not one, or a broken one")


def test_npz_with_a_damaged_array(tmp_path, capsys):
    file = tmp_path / "v.npz"
    np.savez_compressed(file, **blobs_2d())
    content = bytearray(file.read_bytes())
    content[60:200] = bytes(140)
    file.write_bytes(content)
    assert_refused(capsys, [file], "this is not an .npz file, or a broken one")


def test_out_not_writable(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert_refused(capsys, ["--out", tmp_path / "file"], "expected a folder that can be written")
    assert_refused(capsys, ["--out", tmp_path / "file" / "below"], "expected a folder that can be written")
    (tmp_path / demo.PICTURE).mkdir()
    file = save(tmp_path / "v.npz", blobs_2d())
    assert_refused(capsys, [file, "--out", tmp_path], "expected a file that can be written")


def test_wrong_device(tmp_path, capsys):
    assert_refused(capsys, ["--device", "abacus"], "--device abacus: expected a device that this torch can use")
    assert_refused(capsys, ["--device", "cuda:99"], "--device cuda:99: expected a device")


def test_wrong_argument_exits_2(capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--colour"])
    assert (stop.value.code, "--colour" in capsys.readouterr().err) == (2, True)


def test_nifti_without_nibabel(tmp_path, capsys, monkeypatch):
    file = tmp_path / "label.nii.gz"
    file.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    assert_refused(capsys, [file], r'needs nibabel: pip install "blobloss_fast\[demo\]"')


@pytest.mark.parametrize("missing", ["matplotlib", "rich", "scipy"])
def test_without_an_extra(missing, capsys, monkeypatch):
    for name in [*sys.modules, missing]:
        if name.split(".")[0] == missing:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "blobloss_fast.demo_picture")
    spec = importlib.util.spec_from_file_location("blobloss_fast.demo_alone", demo.__file__)
    alone = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, alone)
    spec.loader.exec_module(alone)
    assert alone.main([]) == 2
    assert capsys.readouterr() == ("", f'blobloss-fast: the demo needs {missing}: pip install "blobloss_fast[demo]"\n')


def test_sample():
    volume = demo_volume.read_volume(None)
    data = Path(demo_volume.__file__).with_name("data")
    assert (data / "ms_lesions.npz").stat().st_size < 300_000
    assert volume.image.dtype == np.uint8
    sizes = np.bincount(ndimage.label(volume.label, structure=NEIGHBOURS[3])[0].ravel())[1:]
    assert len(sizes) == 43  # as data/README.md and the picture in docs/ say
    assert (sizes.min(), sizes.max()) == (1, 22834)
    assert ((sizes > 10) & (sizes < 1000)).sum() >= 15
    readme = (data / "README.md").read_text(encoding="utf-8")
    for word in ("CC-BY", "Lesjak", "10.1007/s12021-017-9348-7", "43 lesions", "22,834"):
        assert word in readme


def test_module_on_the_sample(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "blobloss_fast"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "43 lesions" in ended.stdout
    assert ended.stdout.splitlines()[-1] == demo.CREDIT
    assert_picture(tmp_path / demo.PICTURE)
