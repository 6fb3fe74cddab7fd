"""Intervals for shares: k right out of n.

Comes in: counts. Goes out: the bounds of a 95 % interval. Does not know what was counted.
"""

from __future__ import annotations

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
