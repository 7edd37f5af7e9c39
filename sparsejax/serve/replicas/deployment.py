"""Engines and fronts as deployments of Ray Serve."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from sparsejax.config import EngineConfig
from sparsejax.errors import SparseJaxError
from sparsejax.serve.admission import ServiceLimits
from sparsejax.serve.errors import Overloaded, Unavailable
from sparsejax.serve.logs import use_json_logs
from sparsejax.serve.openai.app import make_app
from sparsejax.serve.openai.options import HttpOptions
from sparsejax.serve.replicas.front import Report, make_front
from sparsejax.serve.replicas.options import RayOptions
from sparsejax.serve.replicas.relay import Call, Piece, relay
from sparsejax.serve.service import Service

APP = "sparsejax"
ENGINES = "engines"
HEADER = b"x-replica"
REQUEST_ID = b"x-request-id"
"""Ray's proxy adds it to every answer by itself."""
REPORT_SECONDS = 10.0


class Replica:
    """One engine with the whole OpenAI application over it. Limits of keys are the fronts' business."""

    async def __init__(self, config: EngineConfig, limits: ServiceLimits, options: HttpOptions):
        use_json_logs(options.log_level)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._service = Service(config, limits)
        self._app = make_app(self._service, dataclasses.replace(options, key_requests_per_minute=0, key_concurrency=0))
        self._service.start()
        await self._service.loaded()

    async def answer(self, call: Call) -> AsyncGenerator[Piece]:
        async for piece in relay(self._app, call):
            if isinstance(piece, tuple):
                status, headers = piece
                own = [header for header in headers if header[0] != REQUEST_ID]
                piece = status, [*own, (HEADER, self._name.encode())]
            yield piece

    async def report(self) -> Report:
        metrics, _ = self._app.state.metrics.render()
        return {
            "replica": self._name,
            "status": self._service.status.value,
            "requests": self._service.admission.requests,
            "metrics": metrics.decode(),
        }

    async def check_health(self) -> None:
        """Ray calls this, and replaces a replica that fails."""
        if not self._service.alive:
            raise SparseJaxError(f"the engine is {self._service.status.value} or hangs in a step.")


def application(config: EngineConfig, limits: ServiceLimits, options: HttpOptions, replicas: RayOptions) -> Any:
    """What `serve.run` takes."""
    most = max(replicas.max_replicas, replicas.min_replicas)
    engines = serve.deployment(Replica).options(
        name=ENGINES,
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.min_replicas,
            max_replicas=most,
            initial_replicas=replicas.min_replicas,
            target_ongoing_requests=replicas.target_requests,
            upscale_delay_s=replicas.upscale_delay,
            downscale_delay_s=replicas.downscale_delay,
        ),
        max_ongoing_requests=limits.max_requests,
        max_queued_requests=replicas.max_queued,
        graceful_shutdown_timeout_s=options.shutdown_timeout,
        ray_actor_options={
            "num_cpus": replicas.replica_cpus,
            "num_gpus": replicas.replica_gpus,
            "resources": {"TPU": replicas.replica_tpus} if replicas.replica_tpus else {},
        },
        request_router_config=RequestRouterConfig(
            request_router_class="sparsejax.serve.replicas.router:PrefixRouter",
            request_router_kwargs={"imbalance": replicas.imbalance},
        ),
    )

    def build() -> Any:
        handle = serve.get_deployment_handle(ENGINES, APP)

        async def forward(call: Call) -> AsyncGenerator[Piece]:
            try:
                response = handle.options(method_name="answer", stream=True).remote(call)
                async for piece in response:
                    yield piece
            except (asyncio.CancelledError, GeneratorExit):
                response.cancel()
                raise
            except BackPressureError as error:
                raise Overloaded(f"the server is busy: {error}. Try again later.", 1.0) from error
            except (DeploymentUnavailableError, RayActorError) as error:
                raise Unavailable("the replica of this request is gone. Try again later.") from error

        async def reports() -> list[Report]:
            said = await handle.broadcast("report").results_async(timeout_s=REPORT_SECONDS, return_exceptions=True)
            return [report for report in said if isinstance(report, dict)]

        return make_front(options, forward, reports)

    fronts = serve.deployment(serve.ingress(build)()).options(
        name="fronts",
        num_replicas=replicas.fronts,
        max_ongoing_requests=most * limits.max_requests + replicas.max_queued + 64,
        ray_actor_options={"num_cpus": 0},
    )
    return fronts.bind(engines.bind(config, limits, options))
