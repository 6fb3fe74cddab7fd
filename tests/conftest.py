"""One thread a process: pytest runs as many processes as there are cores, and more threads than cores only wait."""

import os
import tempfile

os.environ["XDG_CACHE_HOME"] = os.path.join(tempfile.gettempdir(), "bifrost-tests-cache")  # not the user's own
os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported, here and in every process a test starts
