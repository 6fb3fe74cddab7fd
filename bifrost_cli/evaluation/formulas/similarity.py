"""PSNR and SSIM of two uint8 images, in float64. Libraries differ in window and border; this is the original rule.

PSNR = 10 log10(255^2 / MSE)
SSIM = mean over the image of (2 m1 m2 + C1)(2 s12 + C2) / ((m1^2 + m2^2 + C1)(s1^2 + s2^2 + C2))
       Wang et al. 2004: Gaussian windows of 11x11 pixels and deviation 1.5, C1 = 0.01^2, C2 = 0.03^2 on [0, 1]
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import correlate1d

WINDOW, DEVIATION = 11, 1.5


def psnr(first_HWc: np.ndarray, second_HWc: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images. ValueError: not two uint8 images of one size."""
    first, second = _pair(first_HWc, second_HWc)
    error = float(np.mean((first - second) ** 2))
    return float("inf") if error == 0.0 else -10.0 * float(np.log10(error))


def ssim(first_HWc: np.ndarray, second_HWc: np.ndarray) -> float:
    """Structural similarity, the mean over channels. ValueError as `psnr`, or a side below the window's 11 pixels."""
    first, second = _pair(first_HWc, second_HWc)
    if min(first.shape[:2]) < WINDOW:
        raise ValueError(f"SSIM needs at least {WINDOW} pixels a side, not {first.shape[:2]}")
    mean_1, mean_2 = _blur(first), _blur(second)
    variance_1, variance_2 = _blur(first**2) - mean_1**2, _blur(second**2) - mean_2**2
    covariance = _blur(first * second) - mean_1 * mean_2
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_1 * mean_2 + c1) * (2 * covariance + c2)
    return float((top / ((mean_1**2 + mean_2**2 + c1) * (variance_1 + variance_2 + c2))).mean())


def _pair(first_HWc: np.ndarray, second_HWc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if first_HWc.dtype != np.uint8 or second_HWc.dtype != np.uint8 or first_HWc.shape != second_HWc.shape:
        raise ValueError(
            f"two uint8 images of one size, not {first_HWc.dtype} {first_HWc.shape} and "
            f"{second_HWc.dtype} {second_HWc.shape}"
        )
    return first_HWc.astype(np.float64) / 255.0, second_HWc.astype(np.float64) / 255.0


def _blur(values_HWc: np.ndarray) -> np.ndarray:
    """Gaussian means of whole windows: (H - 10, W - 10, c)."""
    half = WINDOW // 2
    weights = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * DEVIATION**2))
    for axis in (0, 1):
        values_HWc = correlate1d(values_HWc, weights / weights.sum(), axis=axis)
    return values_HWc[half:-half, half:-half]
