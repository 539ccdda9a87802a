"""Fine-tune Phi-4-multimodal on speechocean762 (paper 3.2, 4.2), with a plain PyTorch loop.

    python train.py --rank 64 --epochs 3                              # the paper's run: fetches model and corpus
    python train.py --rank 64 --epochs 1 --limit 10 --output check    # ten utterances, before a long run
    python train.py --model tiny/model --data tiny/corpus --rank 16 --alpha 32 --learning-rate 3e-3   # on a laptop

Writes into --output: settings.json, log.jsonl (one line a step) and an adapter per epoch. Then: evaluate.py.
"""

import argparse
import importlib.metadata
import json
import math
import random
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import model as models

# ----------------------------------------------------------------------------------------------------------------------
# Settings: each declared once, shown by --help, printed, and saved beside the adapter


def parse_settings():
    """The command line as a namespace; exits with 2 when a value is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        usage="python train.py [settings]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("data (paper 4.1)").add_argument
    add("--data", default=data.HUB_CORPUS, help="corpus folder in the release's layout, or hub id")
    add("--data-revision", default=data.HUB_CORPUS_REVISION, help="of the hub id; the labels changed in April 2026")
    add("--limit", type=positive_int, help="use only the first N utterances")

    add = parser.add_argument_group("model (paper 3.2)").add_argument
    add("--model", default=models.HUB_MODEL, help="checkpoint folder or hub id")
    add("--revision", default=models.HUB_MODEL_REVISION, help="of the hub id: transformers' own format")
    add("--strategy", choices=models.STRATEGIES, default="lora", help="what trains, besides the control tokens")
    add(
        "--speech-adapter",
        choices=models.SPEECH_ADAPTERS,
        default="merge",
        help="the shipped one: fold it into the "
        "frozen weights and train a fresh LoRA, train it on at its own rank (the paper's wording), or leave it out",
    )
    add("--rank", type=positive_int, default=64, help="of the fresh LoRA (not in the paper; our choice)")
    add("--alpha", type=positive_int, default=128, help="of the fresh LoRA, scale alpha / rank (our choice)")
    add("--dropout", type=fraction, default=0.05, help="of the fresh LoRA's input (our choice)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of frozen weights; trained ones are float32. auto: bfloat16 on CUDA, float32 on a CPU",
    )
    add("--attention", choices=("sdpa", "eager", "flash_attention_2"), default="sdpa", help="implementation")

    add = parser.add_argument_group("optimisation (paper 4.2)").add_argument
    add("--epochs", type=positive_int, default=3, help="passes over the corpus (Table 3 reports 1-4, 3 is best)")
    add("--batch-size", type=positive_int, default=8, help="examples in a micro-batch (paper 4.2)")
    add("--accumulation", type=positive_int, default=8, help="micro-batches in a step (paper 4.2)")
    add("--learning-rate", type=positive_float, default=2e-5, help="peak (paper 4.2)")
    add("--warmup", type=fraction, default=0.03, help="fraction of all steps with linear warmup (our choice)")
    add("--weight-decay", type=fraction, default=0.0, help="AdamW's; 0 makes it the paper's Adam (paper 4.2)")
    add("--betas", type=fraction, nargs=2, default=(0.9, 0.999), help="of AdamW (PyTorch's; not in the paper)")
    add("--epsilon", type=positive_float, default=1e-8, help="of AdamW (PyTorch's; not in the paper)")
    add("--clip", type=positive_float, default=1.0, help="largest norm of a step's gradient (our choice)")

    add = parser.add_argument_group("run").add_argument
    add("--seed", type=seed, default=0, help="of weights, order of examples and dropout (our choice)")
    add("--output", type=Path, default=Path("out"), help="folder for adapters, settings and log")

    settings = parser.parse_args()
    if settings.speech_adapter == "continue":
        fresh = ("rank", "alpha", "dropout")
        explicit = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(fresh)))  # None where not given
        if given := [f"--{name}" for name in fresh if getattr(explicit, name) is not None]:
            parser.error(f"--speech-adapter continue trains the shipped adapter as it is: leave out {' '.join(given)}")
    if settings.dtype == "auto":
        settings.dtype = models.default_dtype()
    return settings


def positive_int(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 up")
    return int(text)


def positive_float(text):
    if not 0 < _float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return float(text)


def fraction(text):
    if not 0 <= _float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction from 0 to below 1")
    return float(text)


def seed(text):
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a seed from 0 to 2^32 - 1")
    return int(text)


def _float(text):
    try:
        return float(text)
    except ValueError:
        return math.nan


# ----------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(step, steps, peak, warmup):
    """Rate of a step (counted from 0): linear over the warmup steps up to the peak, then a cosine down to 0.

    The first step has peak / warmup, not 0, and the step after the last one would have 0.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(settings):
    """One run, from the corpus to the adapters. Raises InputError before anything slow when the input is wrong."""
    if (settings.output / "log.jsonl").exists():
        raise data.InputError(f"{settings.output} holds a run already: move it away or choose another --output")
    models.check_model(settings.model)
    utterances = data.read_corpus(settings.data, "train", settings.data_revision, settings.limit)
    print(f"corpus: {data.describe(utterances)}")
    plan = batch_arithmetic(len(utterances) * data.EXAMPLES_PER_UTTERANCE, settings)
    make_output(settings.output)

    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(settings.seed)
    model = build_model(settings)
    examples = [e for u in utterances for e in data.make_examples(u, model.tokenizer, model.audio_id)]
    record = record_settings(settings)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay
    )
    started, step = time.perf_counter(), 0
    model.train()
    with open(settings.output / "log.jsonl", "w") as log, tqdm(total=plan["steps"], unit="step") as bar:
        for epoch in range(1, settings.epochs + 1):
            for step_examples in data.epoch_steps(examples, plan["step_size"], settings.seed, epoch):
                step_started = time.perf_counter()
                # Learning rate: a function of the step alone
                rate = learning_rate(step, plan["steps"], settings.learning_rate, plan["warmup"])
                for group in optimiser.param_groups:
                    group["lr"] = rate

                # Gradient: the mean over all supervised tokens of the step, however it is cut into micro-batches
                supervised = sum(len(example.answer_ids) for example in step_examples)
                loss, tokens, computed = 0.0, 0, 0
                for micro_batch in data.micro_batches(step_examples, settings.batch_size):
                    with models.autocast(model.device):
                        micro_loss = model(micro_batch) / supervised
                    micro_loss.backward()
                    loss += micro_loss.detach()
                    tokens += sum(map(len, micro_batch))
                    computed += max(map(len, micro_batch)) * len(micro_batch)

                # Clip, update
                gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
                optimiser.step()
                optimiser.zero_grad()
                step += 1

                # Log
                line = {"step": step, "epoch": epoch, "loss": float(loss), "learning_rate": rate,
                        "gradient_norm": float(gradient_norm), "supervised_tokens": supervised, "tokens": tokens,
                        "padding": 1 - tokens / computed, "seconds": time.perf_counter() - step_started}  # fmt: skip
                print(json.dumps(line), file=log, flush=True)
                bar.update()
                bar.set_postfix_str(progress(line))

            # Save
            models.save_adapter(model, settings.output / f"epoch-{epoch}", record | {"epoch": epoch})
    print(f"{step} steps in {time.perf_counter() - started:.0f} s, peak memory {peak_memory():.1f} GB")
    print(f"adapters in {settings.output}/epoch-*; next: python evaluate.py --adapter {settings.output}/")


# ----------------------------------------------------------------------------------------------------------------------
# Around the loop


def batch_arithmetic(examples, settings):
    """Print and return how many steps there will be, and what becomes of examples that do not fill one."""
    step_size = min(settings.batch_size * settings.accumulation, examples)
    per_epoch, left = divmod(examples, step_size)
    steps = per_epoch * settings.epochs
    warmup = math.ceil(settings.warmup * steps)
    print(
        f"batches: {settings.batch_size} examples x {settings.accumulation} micro-batches = "
        f"{settings.batch_size * settings.accumulation} a step; {examples:,} examples = {per_epoch} steps an epoch"
    )
    if left:
        print(f"         the {left} examples over are left out of an epoch, other ones each time: the order is random")
    print(f"         {settings.epochs} epochs = {steps} steps, the first {warmup} of them warmup")
    return {"step_size": step_size, "steps": steps, "warmup": warmup}


def make_output(folder):
    """Make the output folder now, so that a run does not fail on it after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.jsonl.tmp").touch()
        (folder / "log.jsonl.tmp").unlink()
    except OSError as error:
        raise data.InputError(f"cannot write into {folder}: {error.strerror}; choose another --output") from error


def build_model(settings):
    """The model with the adapter that is to be trained; prints what trains."""
    model = models.load_base(
        settings.model, settings.revision, settings.dtype, settings.attention, settings.speech_adapter
    )
    lora = models.add_adapter(model, settings.rank, settings.alpha, settings.dropout)
    settings.rank, settings.alpha, settings.dropout = lora.r, lora.lora_alpha, lora.lora_dropout
    counts = models.set_trainable(model, settings.strategy)
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {total:,} parameters on {model.device}, attention {settings.attention}; trained: "
          + ", ".join(f"{group} {count:,}" for group, count in counts.items()))  # fmt: skip
    return model


def record_settings(settings):
    """Print the settings as they will be used, and write them to settings.json."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()}
    print("settings: " + " ".join(f"{key}={value}" for key, value in values.items()))
    values["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    (settings.output / "settings.json").write_text(json.dumps(values, indent=2) + "\n")
    return values


def progress(line):
    """The part of a log line that the progress bar shows."""
    return (f"loss {line['loss']:.4f} lr {line['learning_rate']:.1e} grad {line['gradient_norm']:.2f} "
            f"{line['supervised_tokens'] / line['seconds']:.0f} supervised, "
            f"{line['tokens'] / line['seconds']:.0f} tokens/s")  # fmt: skip


def peak_memory():
    """Largest memory in use so far, in GB: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


if __name__ == "__main__":
    try:
        train(parse_settings())
    except data.InputError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
