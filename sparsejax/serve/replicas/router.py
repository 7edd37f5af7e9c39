"""Prefix affinity as a request router of Ray Serve."""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from sparsejax.serve.replicas.prefix import PrefixMap, rank
from sparsejax.serve.replicas.relay import Call


class PrefixRouter(RequestRouter):
    """Prefers the replica that was given most of a prompt's prefix; see `rank`."""

    def initialize_state(self, imbalance: int) -> None:
        self._imbalance = imbalance
        self._prefixes: PrefixMap[ReplicaID] = PrefixMap()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas in the order in which they are asked; one that is full is passed over."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where all are full, Ray waits before it asks again
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        known = self.replica_queue_len_cache
        loads = {replica: known.get(replica) or 0 for replica in replicas}
        return [[replicas[one]] for one in rank(_leads(pending_request), loads, self._prefixes, self._imbalance)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        self._prefixes.add(replica_id, _leads(pending_request))

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._prefixes.keep({replica.replica_id for replica in replicas})


def _leads(request: PendingRequest | None) -> tuple[int, ...]:
    call = request.args[0] if request is not None and request.args else None
    return call.leads if isinstance(call, Call) else ()
