"""Serves a model to OpenAI's clients from several engines on Ray Serve.

    python scripts/serve_ray.py path/or/hub-id --min-replicas 2 --max-replicas 8 --replica-gpus 1

A request goes to the replica that was given most of its prompt's prefix before, unless that one is much busier than
the others; replicas come and go with the load. Needs the extra ``ray``.
"""

from __future__ import annotations

import argparse
import sys

from sparsejax.cli import options
from sparsejax.cli.main import guarded, split_options
from sparsejax.cli.servers import add_server_options, needs, read_server
from sparsejax.serve.openai.options import HttpOptions
from sparsejax.serve.replicas.options import RayOptions


def run(args: argparse.Namespace) -> int:
    http, limits, config = read_server(args, HttpOptions)
    replicas = RayOptions(**options.given(args, RayOptions))
    with needs("serve,ray"):
        from sparsejax.serve.replicas.cluster import run as run_cluster

    run_cluster(config, limits, http, replicas)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    options.add_fields(parser, "replicas", RayOptions)
    add_server_options(parser, "HTTP server", HttpOptions)
    return guarded(parser.parse_args(split_options(sys.argv[1:]), argparse.Namespace(run=run)))


if __name__ == "__main__":
    sys.exit(main())
