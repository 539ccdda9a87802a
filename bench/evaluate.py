"""Writing the answers: one utterance at a time, in batches, and APA by the distributions of its scores.

    python bench/evaluate.py                                                   # the scaled model, five minutes
    python bench/evaluate.py --adapter out/epoch-4 --data tiny/corpus --batch-size 4   # a trained one, the demo's
    python bench/evaluate.py --full                                            # on a CUDA GPU: the full-size model

"one at a time" is the loop that a notebook has: for each utterance and task features, prompt and generate, through the
model's own forward. A trained model ends its answers itself. Random weights hardly ever write <|end|>, so an answer is
given the length of the right one; a batch goes on until its longest answer is written, as with a trained model. "both
tasks, batched" is what evaluate.py does: the questions of both tasks in one batch. The ways take turns.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
import tempfile

import workload  # first: it finds the project
from workload import clock

# isort: split
import torch

import data
import model as models
import prompts
from support import cli, memory, run_folder, token_rows

ALL = 2500  # utterances of the test part


@dataclass
class Settings:
    data: str | None = None  # corpus folder; default: noise of the corpus' lengths
    full: bool = False  # the full-size model; needs a CUDA GPU
    adapter: Path | None = None  # epoch folder of train.py; default: random weights
    utterances: cli.Count = 32  # of the test part
    batch_size: cli.Count = 16  # as of evaluate.py
    runs: cli.Count = 5  # of each way


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
        questions = [model.question(utterance, task) for utterance in batch]
        model.generate(questions, model.hear(batch), limit(batch, task))


def both(model, utterances, task, limit, size):
    for batch in batches(utterances, size):
        questions = [model.question(utterance, task) for utterance in batch for task in prompts.TASKS]
        audio = [embeddings for embeddings in model.hear(batch) for _ in prompts.TASKS]
        limits = [limit(batch, task) for task in prompts.TASKS]
        with ended(model, limits):
            model.generate(questions, audio, max(limits))


@contextmanager
def ended(model, limits):
    """End the answers of a batch of both tasks, which stand one after the other, after so many tokens of each."""
    likeliest, step, end = model._likeliest, 0, model.tokenizer.convert_tokens_to_ids(prompts.END)

    def limited(hidden):
        nonlocal step
        step += 1
        tokens = likeliest(hidden)
        for first, limit in enumerate(limits):
            if step == limit < max(limits):
                part = len(tokens) // len(limits)
                tokens[first * part : (first + 1) * part] = end
            elif step == limit:
                tokens[:] = end
        return tokens

    model._likeliest = limited
    try:
        yield
    finally:
        del model._likeliest


def expected(model, utterances, task, limit, size):
    for batch in batches(utterances, size):
        model.score_distributions([model.question(utterance, task) for utterance in batch], model.hear(batch))


WAYS = {
    "APA, one at a time": (one_at_a_time, "APA"),
    "APA, batched": (batched, "APA"),
    "APA, expected scores": (expected, "APA"),
    "MDD, one at a time": (one_at_a_time, "MDD"),
    "MDD, batched": (batched, "MDD"),
    "both tasks, batched": (both, None),
}


def load(options, utterances):
    """What the figures are called, the model, and how long an answer may get."""
    if options.adapter:
        ((_, training),) = run_folder.adapters(options.adapter, None)
        model = models.load_base(
            training.model,
            training.revision,
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
    token_rows.merge(model.eval())
    return shape, model, partial(answer_tokens, model)


def main():
    options = cli.parse(Settings, __doc__)
    if options.full and not torch.cuda.is_available():
        raise cli.InputError("--full needs a CUDA GPU and this machine has none: leave it out for the scaled model")
    with tempfile.TemporaryDirectory() as folder:
        if options.data is None:
            workload.write_corpus(Path(folder), options.utterances)
        utterances = data.read_corpus(options.data or folder, "test", limit=options.utterances)
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
    workload.write_result(
        f"evaluate-{name}-{options.batch_size}",
        {
            "model": name,
            "corpus": "/".join(Path(options.data).parts[-2:]) if options.data else "noise",
            "utterances": len(utterances),
            "batch": options.batch_size,
            "all": ALL,
            "peak_gb": memory.peak(),
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    cli.run_script("evaluate.py", main)
