"""`RayOptions`: every setting of the replicas. Imports nothing of Ray."""

from __future__ import annotations

from dataclasses import dataclass

from sparsejax.errors import ConfigError
from sparsejax.serve.checks import above_zero, at_least_zero


@dataclass(frozen=True)
class RayOptions:
    """Settings of the replicas.

    Attributes:
        address: Ray cluster to run on, such as auto or ray://HOST:10001; without one, a cluster of this machine
            is started and ends with the server.
        min_replicas: engines that always run.
        max_replicas: engines that may run under load; 0 is as many as min_replicas, without autoscaling.
        target_requests: requests that a replica works on, on average, before another one is started.
        upscale_delay: seconds of load above the target before a replica is started.
        downscale_delay: seconds of load below the target before one ends; it finishes its requests first.
        max_queued: requests that may wait while every replica is full (each takes --max-requests); more are refused.
        imbalance: requests by which the replica that holds a prefix may be busier than the idlest one; beyond, the
            idlest one computes the prefix too.
        fronts: processes that read and route requests; each learns by itself who holds what.
        replica_cpus: CPU cores that Ray sets aside for a replica.
        replica_gpus: GPUs of a replica.
        replica_tpus: TPU chips of a replica.
    """

    address: str | None = None
    min_replicas: int = 1
    max_replicas: int = 0
    target_requests: float = 16.0
    upscale_delay: float = 30.0
    downscale_delay: float = 600.0
    max_queued: int = 256
    imbalance: int = 8
    fronts: int = 1
    replica_cpus: float = 1.0
    replica_gpus: float = 0.0
    replica_tpus: float = 0.0

    def __post_init__(self) -> None:
        above_zero(self, "min_replicas", "target_requests", "max_queued", "fronts")
        at_least_zero(self, "max_replicas", "upscale_delay", "downscale_delay", "imbalance")
        at_least_zero(self, "replica_cpus", "replica_gpus", "replica_tpus")
        if 0 < self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}: give at least that many, "
                "or 0 for a fixed number."
            )
