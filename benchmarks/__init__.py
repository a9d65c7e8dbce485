"""What attribution costs, measured in alternation in one process: `python -m benchmarks`, or `make bench`."""

import os

# Set before anything is imported: no progress bars of the libraries that are measured, no look-ups on a hub.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
