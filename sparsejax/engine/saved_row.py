"""What a row of the device state held besides its pages, off the device."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


class SavedRow:
    """Arrays on their way to the host: what the device does next to the row changes nothing here."""

    def __init__(self, arrays: Any):
        self.arrays = arrays
        self.nbytes = sum(array.nbytes for array in jax.tree.leaves(arrays))
        for array in jax.tree.leaves(arrays):
            array.copy_to_host_async()

    def settle(self) -> None:
        """Lets go of the device's memory once the bytes have arrived."""
        pending = [array for array in jax.tree.leaves(self.arrays) if isinstance(array, jax.Array)]
        if pending and all(array.is_ready() for array in pending):
            self.arrays = jax.tree.map(np.asarray, self.arrays)
