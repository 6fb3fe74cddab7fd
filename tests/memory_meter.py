"""Peaks of memory in bytes: of what torch has allocated on the CPU, the same at every run, and of a whole process.

torch's profiler reports each allocation and release of the CPU allocator with its size, temporaries inside operators
included; their running sum on top of what the given modules hold is the memory a device would need. Unlike the
resident set it knows no page cache, no allocator slack and no other library, so it repeats to the byte.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import nn
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object], resident: Iterable[nn.Module] = ()) -> int:
    """The highest point during `work`, above what `resident` modules hold before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    changes = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in changes:
        held += event.nbytes()
        peak = max(peak, held)
    return peak + weight_bytes(*resident)


def weight_bytes(*modules: nn.Module) -> int:
    """What the modules' parameters and buffers hold, a shared tensor once."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def resident_peak(work: Callable[[], object]) -> int:
    """How far the resident set of this process rises during `work` above where it stands, in bytes.

    For a process that has nothing else to do: `ru_maxrss` would not do, which a child inherits from its parent, and
    which cannot be set back.
    """
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak of this process begins anew
    work()
    return _resident("VmHWM") - before


def held() -> int:
    """What this process itself holds in memory now, in bytes.

    Without mapped files, a library's code above all, whose pages a kernel drops and reads again as it likes; and
    without what has been freed and lies with the allocator (the C library's; elsewhere it counts).
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # no such library, or one that cannot give back
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _resident("RssAnon")


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])
