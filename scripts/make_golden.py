"""Writes what transformers generates for the tiny checkpoints of the tests: greedy tokens and logprobs.

Runs in an environment with torch and transformers, and imports nothing of sparsejax. Run it again only when a
case changes; the tests read the committed files.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.models.cases import CASES  # noqa: E402
from tests.models.tiny import NEW_TOKENS, prompts, write_checkpoint  # noqa: E402

SMALLEST_GAP = 1e-3  # in logprob: ten times the tolerance of the tests


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[float], float]:
    """``count`` greedy tokens, their log-probabilities, and the smallest gap between best and second."""
    ids, logprobs, gap = list(prompt), [], float("inf")
    for _ in range(count):
        # The whole sequence each time: no cache of the peer takes part in the answer.
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        best = torch.log_softmax(logits, dim=-1).topk(2)
        ids.append(int(best.indices[0]))
        logprobs.append(round(float(best.values[0]), 6))
        gap = min(gap, float(best.values[0] - best.values[1]))
    return ids[len(prompt) :], logprobs, gap


def run_case(name: str, seed: int) -> dict[str, Any]:
    """The golden record of one case, its weights and prompts drawn from the case's seed plus ``seed``."""
    case = CASES[name] | {"seed": CASES[name].get("seed", 0) + seed}
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder), case)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        results = [greedy(model, prompt, NEW_TOKENS) for prompt in prompts(case)]
    return {
        "case": name,
        "seed": case["seed"],
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "smallest_gap": round(min(gap for _, _, gap in results), 6),
        "prompts": prompts(case),
        "tokens": [tokens for tokens, _, _ in results],
        "logprobs": [logprobs for _, logprobs, _ in results],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "tests" / "golden", help="folder for the JSON files"
    )
    parser.add_argument("--seed", type=int, default=0, help="added to every case's seed")
    parser.add_argument("cases", nargs="*", help="case names (default: all)")
    args = parser.parse_args()
    unknown = sorted(set(args.cases) - set(CASES))
    if unknown:
        parser.error(f"unknown cases {unknown}; known: {', '.join(CASES)}")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.cases or CASES:
        record = run_case(name, args.seed)
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
        (args.out / f"{name}.json").write_text("{\n" + lines + "\n}\n")
        distinct = len({token for tokens in record["tokens"] for token in tokens})
        if args.seed == 0 and record["smallest_gap"] < SMALLEST_GAP:
            sys.exit(f"{name}: two best tokens only {record['smallest_gap']} apart; change its seed")
        print(f"{name}: smallest gap {record['smallest_gap']:.4f}, {distinct} distinct tokens", flush=True)


if __name__ == "__main__":
    main()
