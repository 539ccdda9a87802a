"""What the benchmarks run on: a model of the real architecture with random weights, a corpus of the real lengths.

Time and memory depend on shapes alone, so neither the checkpoint nor the real corpus is needed. Outputs mean nothing.
"""

import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
import platform
from statistics import median
import tempfile
import time

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
import torch
from transformers import (
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    PreTrainedTokenizerFast,
)

import data
import model as models
import prompts
from support import files, pretrained
import tiny

RESULTS = Path(__file__).resolve().parent / "results"

# Lengths of speechocean762: median 3.5 s, 95 % below 8.1 s, longest 20.4 s; 1.6 words a second.
MEDIAN_SECONDS, SPREAD, LONGEST_SECONDS = 3.5, 0.51, 20.4  # SPREAD: of the logarithm, ln(8.1 / 3.5) / 1.645
WORDS_PER_SECOND = 1.6

# "full" is the real model. "scaled" has the same proportions on a CPU: every width an eighth and 6 layers of 32, and
# a vocabulary with which the head is 16 % of a token's multiplications, as in the real one (a vocabulary of 200,064
# on a small body would flatter a method that skips it); the audio encoder has its share of the language model too.
FULL = {"num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True}
ROTARY = 24  # of 64 dimensions of a head three quarters rotate, in pairs
VOCABULARY = 4650
SCALED = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0] * ROTARY,
        "long_factor": [1.0] * ROTARY,
    },
    "audio_config": {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_blocks": 5,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 128,
        "depthwise_separable_out_channel": 128,
        "nemo_conv_channels": 128,
        "audio_token_id": VOCABULARY - 1,
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "image_size": 28,
        "crop_size": 28,
        "patch_size": 14,
        "image_token_id": VOCABULARY - 2,
    },
}
SHAPES = {"scaled": SCALED, "full": FULL}
RANK = {"scaled": 8, "full": 64}  # the paper's setting is full size; the same share of a layer's multiplications


def new_tokenizer(texts):
    """Byte-level BPE in which every word of the prompts and of `texts` is one token, as in a large vocabulary.

    So is every score: expected scoring needs it.
    """
    low, high = prompts.SCORE_RANGE
    answers = [prompts.apa_target(dict.fromkeys(prompts.SCORES, score)) for score in range(low, high + 1)]
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 100,
        show_progress=False,
        special_tokens=["<|endoftext|>", *prompts.TURN_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*prompts.PROMPTS.values(), *answers, *texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def new_model(shape, texts, seed=0, nf4=False):
    """A SpeechModel of the shape, frozen, with random weights: bfloat16 on a GPU, float32 on a CPU; or quantised."""
    torch.manual_seed(seed)
    config = Phi4MultimodalConfig(**SHAPES[shape])
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        network = Phi4MultimodalForCausalLM._from_config(config, dtype=getattr(torch, models.default_dtype()))
    network.requires_grad_(False)
    tokenizer, extractor = new_tokenizer(texts), Phi4MultimodalFeatureExtractor()
    if nf4:
        with tempfile.TemporaryDirectory() as folder:
            for part in (network, tokenizer, extractor):
                part.save_pretrained(folder)
            del network
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            checkpoint = pretrained.Checkpoint(folder, Path(folder))
            return models.load_base(checkpoint, models.default_dtype(), "sdpa", "none", "nf4")
    return models.SpeechModel(network, tokenizer, extractor)


def speech(rng, voice):
    """A record of scores.json and a waveform (S,) of the corpus' length; noise, as only its length matters."""
    seconds = min(MEDIAN_SECONDS * np.exp(SPREAD * rng.standard_normal()), LONGEST_SECONDS)
    words = rng.choice(list(tiny.LEXICON), max(1, round(WORDS_PER_SECOND * seconds)))
    record = {"text": " ".join(words), **dict.fromkeys(prompts.SCORES, 5)}
    record["words"] = [
        {"text": word, "phones": tiny.LEXICON[word].split(), "accuracy": 10, "mispronunciations": []} for word in words
    ]
    return record, 0.1 * rng.standard_normal(int(seconds * data.SAMPLE_RATE)).astype(np.float32)


def write_corpus(folder, utterances, seed=0):
    """A corpus folder of `utterances` recordings in each of train and test, all of lengths like the real ones'."""
    tiny.write_corpus(folder, {"train": 1, "test": 1}, utterances, seed, speech)


def texts_of(utterances):
    """What a tokenizer has to know as words."""
    return [f"{u.text} {' '.join(u.heard)}" for u in utterances]


def clock():
    """Seconds; a GPU has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def installed(package):
    return importlib.util.find_spec(package) is not None


def write_result(name, content):
    """Keep a benchmark's figures in bench/results/, with what they were measured on."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "flash-attn")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    measured = {
        "benchmark": name,
        "device": torch.cuda.get_device_name() if kind == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {p: importlib.metadata.version(p) for p in packages if installed(p.replace("-", "_"))},
    }
    with files.whole(RESULTS / f"{name}-{kind}.json") as temporary:
        temporary.write_text(json.dumps(measured | content, indent=1) + "\n")


def spread(values, digits=2):
    """The median, and the range, as text."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
