"""One thread a process: pytest runs as many processes as there are cores, and more threads than cores only wait."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported, here and in every process a test starts
