"""Formulas of the metrics, in float64 NumPy: Frechet and kernel distance, PRDC, Inception score, PSNR and SSIM."""
