"""How many answers depend on the batch size: the same utterances one at a time and sixteen at a time.

    python bench/batch_sizes.py --adapter out/epoch-8                      # in bfloat16, as on a GPU
    python bench/batch_sizes.py --adapter out/epoch-8 --dtype float32

Sums are rounded by a batch's shape, so hidden states differ in their last bits; in bfloat16 that is one part in 256.
"""

import argparse
import json
from pathlib import Path

import workload  # first: it finds the project

# isort: split
import numpy as np
import torch
from tqdm import tqdm

import data
import evaluate
import model as models
import prompts
from support import cli

SIZES = (1, 16)  # utterances in a batch


@torch.no_grad()
def answer(model, utterances, size):
    """Greedy answers {(id, task): text} and expected scores {id: (4,)}, in batches of `size` of similar length."""
    texts, scores = {}, {}
    ordered = sorted(utterances, key=lambda utterance: utterance.samples)
    for start in tqdm(range(0, len(ordered), size), desc=f"batches of {size}"):
        batch = ordered[start : start + size]
        audio = model.audio_embeddings(batch)
        for task in prompts.TASKS:
            answers = model.generate(batch, audio, task, data.MAX_NEW_TOKENS)
            texts |= {(u.id, task): text for u, (text, *_) in zip(batch, answers, strict=True)}
        expected = model.score_distributions(batch, audio) @ torch.arange(11.0, device=model.device)  # (B, 4)
        scores |= dict(zip((u.id for u in batch), expected.cpu().numpy(), strict=True))
    return texts, scores


def main():
    """Print and keep how many answers differ, and by how much expected scores do."""
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="an epoch-N folder of train.py")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of frozen weights")
    parser.add_argument("--limit", type=cli.positive_int, default=200, help="utterances of the test part (200)")
    args = parser.parse_args()
    ((folder, settings),) = evaluate.adapter_folders(args.adapter, None)
    utterances = data.read_corpus(settings["data"], "test", settings.get("data_revision"), args.limit)
    model = models.load_base(
        settings["model"],
        settings.get("revision"),
        args.dtype,
        "sdpa",
        settings["speech_adapter"],
        settings.get("quantize"),
    )
    models.load_trained(model, folder, settings["strategy"])
    (texts, scores), (other_texts, other_scores) = (answer(model, utterances, size) for size in SIZES)
    difference = np.abs([scores[u.id] - other_scores[u.id] for u in utterances])  # (utterances, 4)
    result = {
        "model": settings["model"],
        "utterances": len(utterances),
        "batches": SIZES,
        **{
            f"{task} answers that differ": sum(texts[u.id, task] != other_texts[u.id, task] for u in utterances)
            for task in prompts.TASKS
        },
        "difference of expected scores, mean": float(difference.mean()),
        "at most": float(difference.max()),
    }
    print(json.dumps(result, indent=1))
    workload.write_result(f"batch_sizes-{args.dtype}", result)


if __name__ == "__main__":
    cli.run_script("batch_sizes.py", main)
