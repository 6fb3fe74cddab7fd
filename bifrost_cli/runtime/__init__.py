"""The running process: user interface, distributed ranks, launching, signals."""
