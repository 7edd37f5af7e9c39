"""Talks with a gRPC server: start `sparsejax grpc`, then run `python examples/grpc_client.py`."""

from __future__ import annotations

import argparse

from sparsejax.serve.grpc.client import GrpcClient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="127.0.0.1:50051", help="address of the server")
    parser.add_argument("--token", help="API token")
    parser.add_argument("--prompt", default="The key of the archive is")
    args = parser.parse_args()
    with GrpcClient(args.target, token=args.token, timeout=120) as client:
        info = client.model_info()
        print(f"{info.names[0]}: {info.family}, {info.vocab_size} tokens, up to {info.max_model_len} at once")
        params = {"max_tokens": 32, "temperature": 0.0}
        for piece in client.stream(args.prompt, params):
            for part in piece.outputs:
                print(part.text, end="", flush=True)
        print()
        whole = client.generate(args.prompt, {**params, "logprobs": 0})
        print(f"{len(whole.outputs[0].token_ids)} tokens, log-probability {whole.outputs[0].cumulative_logprob:.2f}")
        print(f"KV pages in use: {client.stats()['kv_live_pages']:.0f}, bytes held: {client.memory()['total']:,}")


if __name__ == "__main__":
    main()
