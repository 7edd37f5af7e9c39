"""Runs in a process of its own: start an engine, stream one prompt, print when each stage was reached.

Times are seconds since the epoch, so that the caller can count from before the process existed.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    settings = json.loads(sys.argv[1])
    began = time.time()
    from sparsejax import Engine, SamplingParams

    import_done = time.time()
    with Engine(settings["model"], compile_cache_dir=settings["cache"]) as engine:
        ready = time.time()
        prompt = (
            "Q: What is the magic number?\nA:" if engine.tokenizer else {"prompt_token_ids": [5, 6, 7, 8]}
        )
        stream = engine.stream(prompt, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
        next(stream)
        first = time.time()
        stages = {"interpreter": began, "import": import_done, "ready": ready, "first_token": first}
        print(json.dumps({"stages": stages, "compiles": engine.stats()["compiles"]}))
        stream.close()


if __name__ == "__main__":
    main()
