"""Precision, recall, density and coverage: how two sets of features lie in each other's neighbourhoods.

Comes in: features of generated and of reference images. Goes out: four numbers. Does not know networks or files.

With the ball of a point being as wide as its k-th nearest neighbour of its own set is far:
    precision   share of generated points inside any reference ball           Kynkaanniemi et al. 2019, eq. 2
    recall      share of reference points inside any generated ball
    density     reference balls that hold a generated point, over k           Naeem et al. 2020, eqs. 6 and 7
    coverage    share of reference balls that hold a generated point

Shapes: N generated, M reference, D features.
"""

from __future__ import annotations

import numpy as np

from bifrost_cli.errors import DataError

_BLOCK = 2048  # rows of a distance matrix held at once


def prdc(made_ND: np.ndarray, real_MD: np.ndarray, *, neighbours: int = 5) -> dict[str, float]:
    """precision, recall, density, coverage. ADM and torch-fidelity take 3 neighbours for the first two.

    DataError: not more images than neighbours on a side, or features that are not finite.
    """
    made_ND, real_MD = np.asarray(made_ND, np.float64), np.asarray(real_MD, np.float64)
    if min(len(made_ND), len(real_MD)) <= neighbours:
        raise DataError(
            f"{neighbours} neighbours need more images than {len(made_ND)} and {len(real_MD)}", code="BF-DATA-008"
        )
    if not (np.isfinite(made_ND).all() and np.isfinite(real_MD).all()):
        raise DataError("the features hold values that are not finite (NaN or infinity)", code="BF-DATA-009")
    made_radius_N, real_radius_M = _radius(made_ND, neighbours), _radius(real_MD, neighbours)
    in_made_M, in_real_N = np.zeros(len(real_MD), bool), np.zeros(len(made_ND), int)
    covered_M = np.zeros(len(real_MD), bool)
    for start in range(0, len(made_ND), _BLOCK):
        rows = slice(start, start + _BLOCK)
        distance_nM = _distances(made_ND[rows], real_MD)
        in_made_M |= (distance_nM <= made_radius_N[rows, None]).any(axis=0)
        inside_nM = distance_nM <= real_radius_M
        in_real_N[rows] = inside_nM.sum(axis=1)
        covered_M |= inside_nM.any(axis=0)
    return {
        "precision": float((in_real_N > 0).mean()),
        "recall": float(in_made_M.mean()),
        "density": float(in_real_N.mean() / neighbours),
        "coverage": float(covered_M.mean()),
    }


def _radius(points_ND: np.ndarray, neighbours: int) -> np.ndarray:
    """Distance to the k-th nearest other point; a point is its own nearest."""
    blocks = range(0, len(points_ND), _BLOCK)
    nearest = [
        np.partition(_distances(points_ND[at : at + _BLOCK], points_ND), neighbours, axis=1)[:, neighbours]
        for at in blocks
    ]
    return np.concatenate(nearest)


def _distances(first_ND: np.ndarray, second_MD: np.ndarray) -> np.ndarray:
    squares_NM = (first_ND**2).sum(1)[:, None] + (second_MD**2).sum(1) - 2.0 * first_ND @ second_MD.T
    return np.sqrt(np.maximum(squares_NM, 0.0))
