"""Training over several devices: parameters on each of them, what a batch holds spread among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from sparsejax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Spread:
    """A mesh of one axis."""

    mesh: Mesh

    @classmethod
    def over(cls, devices: Sequence[jax.Device], **sizes: int) -> Spread:
        """All of the devices.

        Raises:
            ConfigError: one of the `sizes` of a batch cannot be spread over them.
        """
        for name, size in sizes.items():
            if size % len(devices):
                raise ConfigError(f"{name}={size} cannot be spread over {len(devices)} devices: give a multiple of it")
        return cls(Mesh(np.asarray(devices), ("data",)))

    def everywhere[Tree](self, tree: Tree) -> Tree:
        """A copy on each device."""
        return jax.device_put(tree, NamedSharding(self.mesh, Spec()))

    def split[Tree](self, tree: Tree) -> Tree:
        """The leading dimension of each array cut among the devices."""
        return jax.device_put(tree, NamedSharding(self.mesh, Spec("data")))
