"""The life of replicas on a Ray cluster: from its start to the last request."""

from __future__ import annotations

import asyncio
import logging

import ray
from ray import serve

from sparsejax.config import EngineConfig
from sparsejax.errors import ConfigError
from sparsejax.serve.admission import ServiceLimits
from sparsejax.serve.logs import use_json_logs
from sparsejax.serve.openai.options import HttpOptions
from sparsejax.serve.replicas.options import RayOptions

log = logging.getLogger("sparsejax.serve")


def run(config: EngineConfig, limits: ServiceLimits, options: HttpOptions, replicas: RayOptions) -> None:
    """Serves until SIGTERM or SIGINT; running requests get `shutdown_timeout` s to finish. A second signal ends all.

    Raises:
        ConfigError: a setting cannot be used with Ray.
    """
    if options.ssl_certfile:
        raise ConfigError("Ray's proxy takes no certificate: turn TLS on in front of it, or in Ray's own settings.")
    use_json_logs(options.log_level)
    own = replicas.address is None
    ray.init(address=replicas.address, include_dashboard=False if own else None, log_to_driver=True)
    # Only now: a cluster is forked off this process, and threads of JAX must not exist then.
    from sparsejax.serve.replicas.deployment import APP, application

    serve.start(http_options={"host": options.host, "port": options.port})
    try:
        serve.run(application(config, limits, options, replicas), name=APP, route_prefix="/")
        log.info("ready", extra={"fields": {"address": f"{options.host}:{options.port}"}})
        asyncio.run(_asked())
        log.info("draining")
        serve.delete(APP)
    finally:
        if own:
            serve.shutdown()
        ray.shutdown()


async def _asked() -> None:
    from sparsejax.serve.lifecycle import catch_signals

    await catch_signals().wait()
