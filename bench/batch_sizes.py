"""How many answers depend on the batch size: the same utterances one at a time and sixteen at a time.

    python bench/batch_sizes.py --adapter out/epoch-4                      # in bfloat16, as on a GPU
    python bench/batch_sizes.py --adapter out/epoch-4 --dtype float32

Sums are rounded by a batch's shape, so hidden states differ in their last bits; in bfloat16 that is one part in 256.
"""

from dataclasses import dataclass
import json
from pathlib import Path
from typing import Literal

import workload  # first: it finds the project

# isort: split
import numpy as np
from tqdm import tqdm

import data
import metrics
import model as models
import prompts
from support import cli, run_folder

SIZES = (1, 16)  # utterances in a batch


@dataclass(kw_only=True)
class Settings:
    adapter: Path  # an epoch-N folder of train.py
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of frozen weights
    limit: cli.Count = 200  # utterances of the test part


def answer(model, utterances, size):
    """Greedy answers {(id, task): text} and expected scores {id: (4,)}, in batches of `size` of similar length."""
    texts, scores = {}, {}
    ordered = sorted(utterances, key=lambda utterance: utterance.samples)
    for start in tqdm(range(0, len(ordered), size), desc=f"batches of {size}"):
        for line in model.answer(ordered[start : start + size], ("greedy", "expected")):
            texts[line["id"], line["task"]] = line["output"]
            if "scores" in line:
                scores[line["id"]] = [metrics.expectation(line["scores"][name]) for name in prompts.SCORES]
    return texts, scores


def main():
    """Print and keep how many answers differ, and by how much expected scores do."""
    settings = cli.parse(Settings, __doc__)
    ((folder, training),) = run_folder.adapters(settings.adapter, None)
    utterances = data.read_corpus(training.data, "test", training.data_revision, settings.limit)
    model = models.load_base(
        training.model, training.revision, settings.dtype, "sdpa", training.speech_adapter, training.quantize
    )
    models.load_trained(model, folder, training.strategy)
    (texts, scores), (other_texts, other_scores) = (answer(model, utterances, size) for size in SIZES)
    difference = np.abs([scores[u.id] - other_scores[u.id] for u in utterances])  # (utterances, 4)
    result = {
        "model": training.model,
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
    workload.write_result(f"batch_sizes-{settings.dtype}", result)


if __name__ == "__main__":
    cli.run_script("batch_sizes.py", main)
