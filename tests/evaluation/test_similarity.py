"""PSNR and SSIM: known errors, the closed form of constant images, a plain window, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bifrost_cli.evaluation.formulas import psnr, ssim


def image(seed: int, size: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)


def test_equal_pictures():
    assert psnr(image(0), image(0)) == math.inf
    assert ssim(image(0), image(0)) == pytest.approx(1.0, abs=1e-12)


def test_psnr_of_a_known_error():
    one = np.full((16, 16, 3), 100, np.uint8)
    assert psnr(one, one + 20) == pytest.approx(20 * math.log10(255 / 20), rel=1e-12)


def test_ssim_of_constant_pictures():
    """The variances vanish: (2ab + C1) / (a^2 + b^2 + C1)."""
    low, high = 100 / 255, 120 / 255
    one, other = (np.full((32, 32, 3), value, np.uint8) for value in (100, 120))
    expected = (2 * low * high + 1e-4) / (low**2 + high**2 + 1e-4)
    assert ssim(one, other) == pytest.approx(expected, rel=1e-9) == pytest.approx(0.983611, abs=1e-6)


def test_ssim_is_the_plain_window():
    one, other = image(1, 13), image(2, 13)
    near = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    weights = np.outer(near, near) / near.sum() ** 2
    x, y, values = one / 255.0, other / 255.0, []
    for channel in range(3):
        for row in range(3):
            for column in range(3):
                a = x[row : row + 11, column : column + 11, channel]
                b = y[row : row + 11, column : column + 11, channel]
                ma, mb = (weights * a).sum(), (weights * b).sum()
                va, vb = (weights * a * a).sum() - ma**2, (weights * b * b).sum() - mb**2
                cov = (weights * a * b).sum() - ma * mb
                values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    assert ssim(one, other) == pytest.approx(np.mean(values), rel=1e-10)


@pytest.mark.parametrize("other", [image(0).astype(np.float32), image(0, 25)])
def test_other_ranges_and_sizes_are_refused(other):
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match="uint8"):
            measure(image(0), other)


def test_a_picture_smaller_than_the_window():
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(image(0, 8), image(1, 8))
