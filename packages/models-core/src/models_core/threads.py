"""How many threads work at a time."""

import os

# Threads that read or write files of this machine: one waits for the disk while another copies, and more than these
# gain nothing.
THREADS = max(2, min(os.cpu_count() or 1, 16))
