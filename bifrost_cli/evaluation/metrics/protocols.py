"""What each measure of eval does, in plain sentences, for `bifrost eval --explain`.

Comes in: names of measures. Goes out: lines. Computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from bifrost_cli.evaluation.formulas.kernel_distance import SUBSET_SIZE, SUBSETS
from bifrost_cli.evaluation.formulas.manifold import NEIGHBOURS
from bifrost_cli.evaluation.metrics import distribution, reconstruction
from bifrost_cli.evaluation.metrics.distribution import POINTS

_FEATURES = (
    "Images are resized by the network's own rule (report.json, extractor.resize); statistics are float64 and kept "
    "under the hash of images, rule and weights."
)
PROTOCOLS = {
    "fid": f"{distribution.PROTOCOL}: Frechet distance between two Gaussians fitted to features, |m1-m2|^2 + "
    f"tr(C1+C2-2(C1 C2)^1/2). {_FEATURES} Its error is a jackknife over ten blocks, never a bootstrap; its limit for "
    f"endlessly many images a line in 1/N through {POINTS} sizes (seed 0). It is called FID only in Inception "
    "features. With several seeds each seed's value is given.",
    "sfid": "As fid, of the first 7 channels of Inception's mixed_6/conv, flattened row by row (NHWC), as ADM.",
    "kid": "Squared maximum mean discrepancy under (x.y/d + 1)^3, without bias: it may be below 0. Its error is a "
    f"jackknife; with enough images the mean over {SUBSETS} subsets of {SUBSET_SIZE} is given as well.",
    "is": "Inception score: exp of the mean KL of p(y|x) against p(y), over 10 splits shuffled with seed 2020, as "
    "torch-fidelity. It needs no reference.",
    "prdc": f"Precision, recall, density and coverage with {NEIGHBOURS} neighbours; with 3, as ADM, for both too.",
    "clipscore": "Two numbers share this name and both are given: 100 max(cos, 0), and Hessel's 2.5 max(cos, 0) on 'A "
    "photo depicts ' + prompt. Errors are clustered by prompt.",
    "shapes": "The built-in world's checker: things, colours, counts, places and a named background all as "
    "asked, with Wilson's 95 % intervals.",
    "geneval": "GenEval's six tasks: objects by a Mask2Former of transformers above 0.3 (counting 0.9), at most 16 a "
    "class, none merged; a place counts beyond a tenth of both sizes; a colour is the nearest of ten in a CLIP, on the "
    "object's crop over grey #999; the mean of the tasks' means, errors clustered by prompt. The original scorer uses "
    "mmdet's Mask2Former: its results come in by bifrost geneval import.",
    "dpg": "DPG-Bench's graph of questions a prompt, answered yes or no by the recipe's MLLM or --judge (the "
    "first word's probabilities); a question counts only with those it depends on; the mean over images, its error "
    "clustered by prompt. Published numbers are mPLUG's.",
    "reconstruction": f"{reconstruction.PROTOCOL}: each image of the reference becomes a square, latents, and a "
    "picture again (the diffusion model reads no text; the recipe's steps and scale, seed 0). PSNR, SSIM and LPIPS compare "
    "uint8 with uint8, image by image; then means with standard errors. The cosine is that of both images' "
    "latents; rFID the Frechet distance to the originals.",
}


def explained(metrics: Sequence[str], fd: Sequence[str]) -> list[str]:
    """A line a measure."""
    return [f"{name}: {PROTOCOLS[name]}" for name in metrics] + [f"fd {ref}: as fid, in its features." for ref in fd]
