"""The number of threads that read and write files."""

import os

# Threads for local files: two at least, so that one copies while another waits for the disk; more than 16 gain
# nothing.
THREADS = max(2, min(os.cpu_count() or 1, 16))
