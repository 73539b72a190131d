import numpy as np
import PIL
import pytest
import torch

from ttt3r.images import (
    Fit,
    fit,
    normalise,
    preprocess,
    preprocess_fast,
    preprocess_on_device,
    source_intrinsics,
)


@pytest.fixture(scope="module")
def recorded(golden):
    return np.load(golden / "preprocess.npz")


def test_fit_agrees_with_the_reference_on_all_sizes(recorded):
    for size, width, height, fitted_width, fitted_height in recorded["size_table"].tolist():
        shape = fit(width, height, size, 16)
        assert (shape.width, shape.height) == (fitted_width, fitted_height), (width, height)


@pytest.mark.parametrize("case", range(8))
def test_preprocess_agrees_with_the_reference(recorded, case):
    found = preprocess(recorded[f"in{case}"], int(recorded[f"size{case}"]), 16)
    assert found.shape[:2] == tuple(recorded[f"true_shape{case}"])
    # Resampling may differ by one grey level between versions of Pillow.
    levels = 0 if PIL.__version__ == str(recorded["pillow_version"]) else 1
    if f"out{case}" in recorded:
        assert np.abs(found.astype(int) - recorded[f"out{case}"]).max() <= levels
    else:
        error = np.abs(found[::8, ::8].astype(int) - recorded[f"out{case}_stride8"])
        assert error.max() <= levels
        np.testing.assert_allclose(
            found.mean(axis=(0, 1)), recorded[f"out{case}_mean"], atol=max(levels, 1e-9)
        )


def portrait() -> np.ndarray:
    """As a phone sees it: Pillow resizes it along columns first."""
    v, u = np.mgrid[0:2400, 0:1080]
    waves = [np.sin(u / 7 + v / 5 + phase) for phase in range(3)]
    return np.uint8(np.clip(128 + 160 * np.stack(waves, axis=-1), 0, 255))


@pytest.mark.parametrize("size", [(80, 8), (224, 16), (512, 16)])
def test_fast_preprocessing_agrees_with_the_exact_one(recorded, size):
    noise = np.random.default_rng(0).integers(0, 256, (540, 960, 3), np.uint8)
    frames = [noise, np.uint8(noise > 127) * np.uint8(255), np.full((375, 1241, 3), 77, np.uint8)]
    frames += [portrait(), *(recorded[f"in{case}"] for case in range(8))]
    for frame in frames:
        exact, fast = (f(frame, *size) for f in (preprocess, preprocess_fast))
        assert fast.dtype == np.uint8
        error = np.abs(exact.astype(int) - fast)
        assert error.max() <= 1


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(512, 16), (224, 16), (80, 8)])
def test_preprocessing_on_a_device_agrees_with_the_exact_one(recorded, size, device):
    noise = np.random.default_rng(0).integers(0, 256, (2, 270, 480, 3), np.uint8)
    batches = [noise, np.uint8(noise > 127) * np.uint8(255), noise[:, :101, :130]]
    batches += [portrait()[None], *(recorded[f"in{case}"][None] for case in range(8))]
    for frames in batches:
        found = preprocess_on_device(torch.from_numpy(frames).to(device), *size).cpu().numpy()
        error = np.abs(found.astype(int) - np.stack([preprocess(f, *size) for f in frames]))
        is_thin = max(frames.shape[1:3]) > 3 * min(frames.shape[1:3])
        assert error.max() <= is_thin


def test_normalise_agrees_with_the_reference(recorded):
    found = normalise(recorded["out0"]).movedim(-3, -1)
    assert torch.equal(found, torch.from_numpy(recorded["out0_float"]))


def test_normalise_maps_black_to_minus_one_and_white_to_one():
    images = np.array([[[[0, 255, 51]]]], np.uint8)
    assert normalise(images)[0, :, 0, 0].tolist() == pytest.approx([-1.0, 1.0, -0.6])


@pytest.mark.parametrize(
    ("source", "size", "patch", "expected"),
    [
        ((1920, 1080), 512, 16, Fit(512, 288, 0, 0, 512, 288)),
        ((513, 511), 512, 16, Fit(512, 510, 0, 7, 512, 496)),
        ((1920, 1080), 80, 8, Fit(80, 45, 0, 2, 80, 40)),  # 45 rows: 22 above the centre, crop 20
        ((720, 720), 512, 16, Fit(512, 512, 0, 64, 512, 384)),
        ((300, 200), 224, 16, Fit(336, 224, 56, 0, 224, 224)),
    ],
)
def test_fit_crops_around_the_centre(source, size, patch, expected):
    assert fit(*source, size, patch) == expected


@pytest.mark.parametrize(
    ("source", "size", "patch", "message"),
    [
        ((4000, 20), 512, 16, "512x3 at image size 512: too thin"),
        ((20, 4000), 512, 16, "too thin"),
        ((0, 100), 512, 16, "0x100"),
        ((640, 480), 8, 16, "too thin"),
        ((640, 480), 512, 7, "patch size is 7"),
    ],
)
def test_fit_refuses_sizes_that_the_model_rejects(source, size, patch, message):
    with pytest.raises(ValueError, match=message):
        fit(*source, size, patch)


def test_preprocess_refuses_what_is_no_rgb_frame():
    with pytest.raises(ValueError, match=r"uint8 \(4, 4\); expected uint8 \[H, W, 3\]"):
        preprocess(np.zeros((4, 4), np.uint8), 64, 8)


def test_fit_cuts_square_images_to_about_4_by_3_in_whole_patches():
    assert (fit(720, 720, 512, 16).width, fit(720, 720, 512, 16).height) == (512, 384)
    # Exactly 4:3 would be 60 and 120 rows: not whole patches.
    assert (fit(200, 200, 80, 8).width, fit(200, 200, 80, 8).height) == (80, 56)
    assert (fit(300, 300, 160, 16).width, fit(300, 300, 160, 16).height) == (160, 112)


def test_source_intrinsics_undo_resize_and_crop():
    # 1000x400 is halved to 500x200, then 10 columns and 20 rows are cut from each side.
    shape = Fit(500, 200, left=10, top=20, width=480, height=160)
    camera = np.array([[300.0, 0, 240], [0, 300, 80], [0, 0, 1]])
    found = source_intrinsics(camera, shape, 1000, 400)
    # The centre, column 240 of the crop, is column 250 of the resized image, whose middle lies
    # at 250.5 of 500 pixel widths: 501 of 1000, column 500.5 when centres are whole numbers.
    expected = [[600.0, 0.0, 500.5], [0.0, 600.0, 200.5], [0.0, 0.0, 1.0]]
    np.testing.assert_allclose(found, expected)
