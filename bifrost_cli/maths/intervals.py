"""How sure a share or a mean is: Wilson's interval for k right out of n, and the standard error of clustered values.

Comes in: counts or values. Goes out: bounds, or an error. Does not know what was counted.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import sqrt

Z95 = 1.959963984540054  # 97.5 % point of the normal distribution


def wilson(right: int, count: int, *, z: float = Z95) -> tuple[float, float]:
    """Bounds of Wilson's score interval for a share (Wilson 1927); inside [0, 1] also for 0 or n right.

        (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    ValueError: no trials, or `right` outside 0..count.
    """
    if count < 1 or not 0 <= right <= count:
        raise ValueError(f"{right} right out of {count} is not a share")
    share, weight = right / count, z * z / count
    centre = share + weight / 2
    spread = sqrt(weight * (share * (1 - share) + weight / 4))
    low = 0.0 if right == 0 else (centre - spread) / (1 + weight)
    high = 1.0 if right == count else (centre + spread) / (1 + weight)
    return low, high


def clustered_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of a mean whose values belong together in clusters, such as the pictures of one prompt.

        sqrt(G/(G-1) sum_g (sum_{i in g} (x_i - mean))^2) / n                  Miller 2024, section 2.2 (G clusters)

    With one value a cluster it is the ordinary standard error; 0.0 for a single cluster. ValueError: no values.
    """
    if not values or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values in {len(clusters)} clusters have no mean")
    mean, sums = sum(values) / len(values), {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    if len(sums) < 2:
        return 0.0
    return sqrt(len(sums) / (len(sums) - 1) * sum(total**2 for total in sums.values())) / len(values)
