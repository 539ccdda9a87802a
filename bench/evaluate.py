"""Writing the answers: one utterance at a time, in batches, and APA by the distributions of its scores.

    python -m bench.evaluate                                                   # the scaled model, five minutes
    python -m bench.evaluate --adapter out/epoch-4 --data tiny/corpus --batch-size 4   # a trained one, the demo's
    python -m bench.evaluate --full                                            # on a CUDA GPU: the full-size model

"one at a time" is the loop that a notebook has: for each utterance and task features, prompt and generate, through the
model's own forward. A trained model ends its answers itself. Random weights hardly ever write <|end|>, so an answer is
given the length of the right one; a batch goes on until its longest answer is written, as with a trained model.
"batched" is what evaluate.py does. The ways take turns.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
import tempfile

import torch

from bench import workload
from bench.workload import clock, spread
import data
import model as models
import prompts
from support import cli, pretrained, run

ALL = 2500  # utterances of the test part


@dataclass
class Settings:
    data: str | None = None  # corpus folder; default: noise of the corpus' lengths
    full: bool = False  # the full-size model; needs a CUDA GPU
    adapter: Path | None = None  # epoch folder of train.py; default: random weights
    utterances: cli.Count = 32  # of the test part
    batch_size: cli.Count = 32  # as of evaluate.py
    runs: cli.Count = 5  # of each way


def answer_tokens(model, utterances, task):
    """Tokens of the longest right answer."""
    examples = data.make_examples(utterances, model.tokenizer, model.audio_id)
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
        questions = [models.question(model, utterance, task) for utterance in batch]
        models.generate(model, questions, model.hear(batch), limit(batch, task))


def expected(model, utterances, task, limit, size):
    for batch in batches(utterances, size):
        models.score_distributions(
            model, [models.question(model, utterance, task) for utterance in batch], model.hear(batch)
        )


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
        ((_, training),) = run.adapters(options.adapter, None)
        model = models.load_base(
            pretrained.find(training.model, training.revision),
            training.dtype,
            training.attention,
            training.speech_adapter,
            training.quantize,
        )
        models.load_trained(model, options.adapter, training.strategy)
        return "trained", model, no_limit
    shape = "full" if options.full else "scaled"
    model = workload.new_model(shape, workload.texts_of(utterances))
    models.add_adapter(model, workload.RANK[shape], 2 * workload.RANK[shape], dropout=0.0)
    return shape, model.eval(), partial(answer_tokens, model)


def main():
    options = cli.parse(Settings, __doc__)
    if options.full and not torch.cuda.is_available():
        raise cli.InputError("--full needs a CUDA GPU and this machine has none: leave it out for the scaled model")
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            workload.write_corpus(Path(folder), options.utterances)
        utterances = data.read_corpus(Path(options.data or folder), "test", limit=options.utterances)
        name, model, limit = load(options, utterances)
        seconds = {name: [] for name in WAYS}
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available()):
            for way, task in WAYS.values():
                way(model, utterances[:2], task, limit, options.batch_size)  # to warm up
            for number in range(options.runs):
                for way_name, (way, task) in WAYS.items():
                    started = clock()
                    way(model, utterances, task, limit, options.batch_size)
                    seconds[way_name].append(clock() - started)
                print(f"run {number + 1}: " + ", ".join(f"{key} {values[-1]:.1f} s" for key, values in seconds.items()))
    rows = []
    for way, values in seconds.items():
        slow = seconds[f"{way[:3]}, one at a time"]
        times = spread([theirs / value for theirs, value in zip(slow, values)], 1)
        hours = f"{median(values) / len(utterances) * ALL / 3600:.2f}"
        rows.append((way, [spread([len(utterances) / value for value in values]), times, hours]))
    columns = ["utterances/s", "times one at a time", f"hours for {ALL:,}"]
    cli.show_table(f"{name}, batches of {options.batch_size}", columns, rows, numbers=False)
    workload.write_result(
        f"evaluate-{name}-{options.batch_size}",
        {
            "corpus": "/".join(Path(options.data).parts[-2:]) if options.data else "noise",
            "utterances": len(utterances),
            "batch": options.batch_size,
            "peak_gb": run.peak_memory(),
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    cli.run_script("bench.evaluate", main)
