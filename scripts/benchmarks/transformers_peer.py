"""Contender: transformers with torch, in one of four modes. Runs in an interpreter that has both; imports
nothing of sparsejax. Its settings are the best of those tried on the workload (see docs/benchmarks.md).
"""

from __future__ import annotations

from contender import Requests, Serve, main

SORTED_BATCH = 4


def load(settings: dict) -> tuple[Serve, dict]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(settings["threads"])
    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=getattr(torch, settings["dtype"]), attn_implementation="sdpa"
    ).eval()
    model.generation_config.eos_token_id = None  # every request generates its full length
    model.generation_config.pad_token_id = 0
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    about = {"versions": versions, "settings": {"attention": model.config._attn_implementation}}
    return MODES[settings["mode"]](model, settings, about["settings"]), about


def padded(model, requests: Requests) -> list:
    """One left-padded batch, generated to its longest output; each request keeps what it asked for."""
    import torch

    width = max(len(prompt) for prompt, _ in requests)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in requests])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in requests])
    longest = max(new for _, new in requests)
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, use_cache=True
        )
    return [row[width : width + new].tolist() for row, (_, new) in zip(out, requests)]  # noqa: B905


def one_by_one(model, settings: dict, used: dict) -> Serve:
    return lambda requests: [padded(model, [request])[0] for request in requests]


def static(model, settings: dict, used: dict) -> Serve:
    return lambda requests: padded(model, requests)


def sorted_batches(model, settings: dict, used: dict) -> Serve:
    """Small batches of prompts of similar length, so that little is padded."""
    size = used["batch"] = settings.get("batch", SORTED_BATCH)

    def serve(requests: Requests) -> list:
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][0]))
        out = [None] * len(requests)
        for start in range(0, len(order), size):
            group = order[start : start + size]
            for index, tokens in zip(group, padded(model, [requests[i] for i in group])):  # noqa: B905
                out[index] = tokens
        return out

    return serve


def continuous(model, settings: dict, used: dict) -> Serve:
    """transformers' own continuous batching; one manager lives for all rounds, its pool fits the workload."""
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    page = settings.get("page_size", 256)
    pool = {
        "page_size": page,
        "num_blocks": settings["pool_tokens"] // page + settings["max_requests"],
        "max_batch_tokens": settings.get("max_batch_tokens", 512),
    }
    used |= pool
    config = ContinuousBatchingConfig(
        **pool,
        max_requests_per_batch=settings["max_requests"],
        allow_block_sharing=False,
        auto_switch_to_flash=False,
        use_cuda_graph=False,
    )
    generation = GenerationConfig(do_sample=False, max_new_tokens=128, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(generation, continuous_batching_config=config)
    manager.start()

    def serve(requests: Requests) -> list:
        with torch.inference_mode():
            ids = [
                manager.add_request(prompt, max_new_tokens=new, eos_token_id=-1) for prompt, new in requests
            ]
            done = {}
            while len(done) < len(ids):
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("the generation thread ended")
                elif result.is_finished():
                    done[result.request_id] = list(result.generated_tokens)
        return [done[i] for i in ids]

    return serve


MODES = {
    "one_by_one": one_by_one,
    "static": static,
    "sorted": sorted_batches,
    "continuous": continuous,
}

if __name__ == "__main__":
    main(load)
