"""The progress bar of weights that are loaded, saved or converted."""

from __future__ import annotations

import tqdm


def weights_bar(progress: bool) -> tqdm.tqdm:
  """A progress bar that counts bytes; `reset` sets their total."""
  hidden = None if progress else True  # None shows bars on a terminal only.
  return tqdm.tqdm(unit="B", unit_scale=True, desc="weights", disable=hidden)
