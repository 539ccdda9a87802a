"""Writing the answers: one utterance at a time, in batches, and APA by the distributions of its scores.

    python bench/evaluate.py                                                   # the scaled model, five minutes
    python bench/evaluate.py --adapter out/epoch-8 --data tiny/corpus --batch-size 4   # a trained one, the demo's
    python bench/evaluate.py --full                                            # on a CUDA GPU: the full-size model

"one at a time" is the loop that a notebook has: for each utterance and task features, prompt and generate, through the
model's own forward. A trained model ends its answers itself. Random weights hardly ever write <|end|>, so an answer is
given the length of the right one; a batch goes on until its longest answer is written, as with a trained model. The
ways take turns.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import workload  # first: it finds the project
from workload import clock

# isort: split
import torch

import data
import model as models
import prompts
import runtime
from support import cli

ALL = 2500  # utterances of the test part


def answer_tokens(model, utterances, task):
    """Tokens of the longest right answer."""
    examples = data.Examples(utterances, model.tokenizer, model.audio_id)
    place = prompts.TASKS.index(task)
    return max(len(examples[len(prompts.TASKS) * i + place].answer_ids) for i in range(len(utterances)))


def no_limit(utterances, task):
    return data.MAX_NEW_TOKENS


@torch.no_grad()
def one_at_a_time(model, utterances, task, limit, size):
    for utterance in utterances:
        features = torch.as_tensor(data.log_mel(utterance, model.extractor), device=model.device)[None]
        ids = data.encode_prompt(utterance, task, model.tokenizer, model.audio_id)
        input_ids = torch.tensor([ids], device=model.device)
        model.core.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            audio_input_features=features,
            audio_embed_sizes=torch.tensor([utterance.audio_tokens]),
            max_new_tokens=limit([utterance], task),
            do_sample=False,
            eos_token_id=model.tokenizer.convert_tokens_to_ids(prompts.END),
        )


def batches(utterances, size):
    ordered = sorted(utterances, key=lambda utterance: utterance.samples)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def batched(model, utterances, task, limit, size):
    for batch in batches(utterances, size):
        model.generate(batch, model.audio_embeddings(batch), task, limit(batch, task))


def expected(model, utterances, task, limit, size):
    for batch in batches(utterances, size):
        model.score_distributions(batch, model.audio_embeddings(batch))


WAYS = {
    "APA, one at a time": (one_at_a_time, "APA"),
    "APA, batched": (batched, "APA"),
    "APA, expected scores": (expected, "APA"),
    "MDD, one at a time": (one_at_a_time, "MDD"),
    "MDD, batched": (batched, "MDD"),
}


def load(options, utterances):
    """What the figures are called, the model, and how long an answer may get."""
    if options.adapter:
        settings = json.loads((options.adapter / "settings.json").read_text())
        model = models.load_base(
            settings["model"],
            settings["revision"],
            settings["dtype"],
            settings["attention"],
            settings["speech_adapter"],
            settings["quantize"],
        )
        models.load_trained(model, options.adapter, settings["strategy"])
        return "trained", model, no_limit
    shape = "full" if options.full else "scaled"
    model = workload.new_model(shape, workload.texts_of(utterances))
    models.add_adapter(model, workload.RANK[shape], 2 * workload.RANK[shape], dropout=0.0)
    models.merge_rows(model.eval())
    return shape, model, partial(answer_tokens, model)


def main():
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="corpus folder (default: noise of the corpus' lengths)")
    parser.add_argument("--full", action="store_true", help="the full-size model; needs a CUDA GPU")
    parser.add_argument("--adapter", type=Path, help="epoch folder of train.py (default: random weights)")
    parser.add_argument("--utterances", type=cli.positive_int, default=32, help="of the test part (32)")
    parser.add_argument("--batch-size", type=cli.positive_int, default=16, help="as of evaluate.py (16)")
    parser.add_argument("--runs", type=cli.positive_int, default=5, help="of each way (5)")
    options = parser.parse_args()
    if options.full and not torch.cuda.is_available():
        parser.error("--full needs a CUDA GPU and this machine has none: leave it out for the scaled model")
    if options.adapter and not (options.adapter / "settings.json").is_file():
        parser.error(f"--adapter {options.adapter} is no epoch folder of train.py: it has no settings.json")
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            workload.write_corpus(Path(folder), options.utterances)
        utterances = data.read_corpus(options.data or folder, "test", limit=options.utterances)
        name, model, limit = load(options, utterances)
        seconds = {name: [] for name in WAYS}
        with runtime.autocast():
            for way, task in WAYS.values():
                way(model, utterances[:2], task, limit, options.batch_size)  # to warm up
            for number in range(options.runs):
                for way_name, (way, task) in WAYS.items():
                    started = clock()
                    way(model, utterances, task, limit, options.batch_size)
                    seconds[way_name].append(clock() - started)
                print(f"run {number + 1}: " + ", ".join(f"{key} {values[-1]:.1f} s" for key, values in seconds.items()))
    workload.write_result(
        f"evaluate-{name}-{options.batch_size}",
        {
            "model": name,
            "corpus": "/".join(Path(options.data).parts[-2:]) if options.data else "noise",
            "utterances": len(utterances),
            "batch": options.batch_size,
            "all": ALL,
            "peak_gb": runtime.peak_memory(),
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    cli.run_script("evaluate.py", main)
