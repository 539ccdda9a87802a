"""Better speech recognition from transcripts that a language model corrected (wav2vec2, LoRA).

    python recipes/gold_transcripts.py --check-llm                                  # load the LLM, time one correction
    python recipes/gold_transcripts.py --audio-dir recordings                       # with recordings/clean and /noisy
    python recipes/gold_transcripts.py --data speechocean762 --quantize nf4         # human text to compare with
    python recipes/gold_transcripts.py --write-tiny tiny-wav2vec2                   # a recogniser for a laptop, then:
    python recipes/gold_transcripts.py --recogniser tiny-wav2vec2 --data speechocean762 --oracle --no-lora \
        --epochs 5 --learning-rate 1.5e-3

A recogniser transcribes all recordings. An LLM, which hears nothing, rewrites each transcript into the sentence that
was most probably said: the gold transcript, frozen once. Where the two differ, the recogniser is fine-tuned on the
gold. Before and after, it is measured on the same speakers, held out of training, against the same gold, and against
human text where there is some, which also says how good the gold is.

Writes into --output: settings.json, gold.jsonl, log.jsonl (one line a step), adapter/ (with --no-lora: model/),
held_out.jsonl and evaluation_results.json.

Shapes: S samples, F frames, V symbols of the recogniser (its blank included), C characters of a text, B prompts of a
batch, T tokens of the longest prompt and its answer.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import math
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

# Messages on import and loading that no user can act on
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# isort: split
import data
import metrics
import runtime
from support import cli, files

transformers_logging.set_verbosity_error()  # Recogniser checks for itself that no weight is missing
transformers_logging.disable_progress_bar()

LLM_SETTINGS = {"llm", "quantize", "max_new_tokens", "llm_batch", "max_distance"}
LORA_SETTINGS = {"rank", "alpha", "dropout"}
CONDITIONS = ("clean", "noisy")  # folders of --audio-dir (document)
LONGEST = 30.0  # seconds of a recording; our choice: attention's memory grows with the square
FEWEST, FEW = 2, 10  # samples to train on: fewer are refused, fewer are warned about (public code)
ATTENTION = r".*encoder\.layers\.\d+\.attention\.(q|k|v|out)_proj"  # gets LoRA (public code)
HEAD = "lm_head"  # of the recogniser; LoRA leaves it frozen unless it is named, and then saves it too
MAY_BE_MISSING = {"wav2vec2.masked_spec_embed"}  # in wav2vec2-base-960h, which then was trained without
ESTIMATE_AFTER = 10  # steps
ORACLE = "oracle gold: human text, not an LLM"
EXAMPLE = "HE WENT TOO THE STOAR TO BY SOME BRED"  # of --check-llm, and the first call of every run

# Ours: the document gives none. Length and meaning are to stay, because what differs is trained on.
PROMPT = """A speech recogniser wrote down one short English utterance, maybe with mistakes. Write the sentence that \
was most probably said. Change only words that are clearly misheard: add nothing, leave nothing out, do not improve \
the speaker's grammar. Write numbers as words. If nothing is misheard, repeat it unchanged. \
Answer with the sentence alone, in one line.

{transcript}"""
LABEL = re.compile(  # "Here is the corrected sentence:", "Output:"
    r"^(?:sure[,!.]?\s*)?(?:here is\s+|here's\s+)?(?:the\s+)?(?:most probable\s+|corrected\s+|rewritten\s+)?"
    r"(?:sentence|transcript|transcription|text|version|output|answer|correction)(?:\s+is)?\s*:\s*",
    re.IGNORECASE,
)

# The 32 symbols of wav2vec2-base-960h, in its order: the blank is <pad>, the space |
SYMBOLS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]


# ----------------------------------------------------------------------------------------------------------------------
# Settings: each declared once, shown by --help, printed, and saved beside the results


def new_parser():
    parser = cli.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        usage="python recipes/gold_transcripts.py (--audio-dir FOLDER | --data FOLDER) [settings]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("data").add_argument
    add(
        "--audio-dir",
        type=Path,
        help="folder of recordings without text; its folders clean/ and noisy/, where there "
        "are any, are reported apart (document)",
    )
    add("--data", help="corpus with human text instead: speechocean762 folder in the release's layout, or hub id")
    add("--split", choices=("train", "test"), default="train", help="part of --data")
    add(
        "--limit",
        type=cli.positive_int,
        help="use only the first N recordings, of clean/ and noisy/ each (the document's N: 100)",
    )
    add(
        "--validation",
        type=cli.fraction,
        default=0.2,
        help="share of speakers held out of training, to measure on; "
        "without known speakers, share of file names (public code: of error samples)",
    )

    add = parser.add_argument_group("gold transcripts").add_argument
    add("--llm", default="mistralai/Mistral-7B-Instruct-v0.3", help="folder or hub id of a chat model (document)")
    add("--quantize", choices=("nf4",), help="keep the LLM in 4 bits (document)")
    add("--max-new-tokens", type=cli.positive_int, default=128, help="an answer that is longer is rejected (document)")
    add("--llm-batch", type=cli.positive_int, default=8, help="transcripts rewritten at once (our choice)")
    add(
        "--max-distance",
        type=cli.positive_float,
        default=0.5,
        help="gold with more word errors against the "
        "transcript, per transcript word, is rejected: the LLM hears nothing, and may invent (our choice)",
    )
    add(
        "--oracle",
        action="store_true",
        help="take the human text of --data as gold instead of asking an LLM: the best that gold can be",
    )
    add("--check-llm", action="store_true", help="load the LLM, show and time one correction, and end")

    add = parser.add_argument_group("recogniser").add_argument
    add("--recogniser", default="facebook/wav2vec2-base-960h", help="folder or hub id, Wav2Vec2ForCTC (document)")
    add("--no-lora", action="store_true", help="train all weights but the feature encoder's (document)")
    add("--rank", type=cli.positive_int, default=8, help="of LoRA (document)")
    add("--alpha", type=cli.positive_int, default=16, help="of LoRA, scale alpha / rank (document)")
    add("--dropout", type=cli.fraction, default=0.1, help="of LoRA's input (public code)")
    add(
        "--time-mask",
        type=cli.fraction,
        default=0.05,
        help="SpecAugment: share of frames hidden in training, in "
        "spans of the checkpoint's mask_time_length (wav2vec2-base-960h's mask_time_prob)",
    )
    add("--write-tiny", type=Path, metavar="FOLDER", help="write a small recogniser with random weights, and end")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=cli.positive_int, default=3, help="passes over the error samples (document)")
    add("--batch-size", type=cli.positive_int, default=4, help="samples in a step (document)")
    add("--learning-rate", type=cli.positive_float, default=3e-5, help="peak (document)")
    add("--warmup", type=cli.fraction, default=0.1, help="share of steps with linear warmup, then cosine (our choice)")
    add("--clip", type=cli.positive_float, default=1.0, help="largest norm of a step's gradient (public code)")

    add = parser.add_argument_group("run").add_argument
    add("--seed", type=cli.seed, default=42, help="of held-out speakers, weights, order, dropout (public code)")
    add("--output", type=Path, default=Path("out-gold"), help="folder for all that is written")
    return parser


def parse_settings():
    """The command line as a namespace. Raises InputError when a value is wrong or two cannot work together."""
    parser = new_parser()
    settings, given = parser.parse_given()
    parser.refuse(conflicts(settings, given))
    unused = (LLM_SETTINGS if settings.oracle else set()) | (LORA_SETTINGS if settings.no_lora else set())
    for name in unused | ({"split"} if settings.audio_dir else set()):
        setattr(settings, name, None)  # so that no file says they were used
    return settings


def conflicts(settings, given):
    """What cannot work together, as (whether it is so, message). given: names of the settings that the user wrote."""

    def named(names):
        return " ".join(f"--{name.replace('_', '-')}" for name in sorted(names))

    lora, of_llm = LORA_SETTINGS & given, LLM_SETTINGS & given
    beside_check = given - {"check_llm", "llm", "quantize", "max_new_tokens"}
    beside_tiny = given - {"write_tiny", "seed"}
    alone = settings.check_llm or settings.write_tiny
    return [
        (settings.check_llm and beside_check, f"--check-llm only loads the LLM: leave out {named(beside_check)}"),
        (
            settings.write_tiny and beside_tiny,
            f"--write-tiny writes a recogniser and ends: leave out {named(beside_tiny)}",
        ),
        (
            not alone and bool(settings.audio_dir) == bool(settings.data),
            "give --audio-dir, a folder of recordings, or --data, a corpus with human text: one of the two",
        ),
        (
            settings.oracle and settings.audio_dir,
            "--oracle takes human text as gold, and --audio-dir has none: give --data, or an LLM with --llm",
        ),
        (settings.oracle and of_llm, f"--oracle asks no LLM: leave out {named(of_llm)}"),
        (settings.no_lora and lora, f"--no-lora trains no LoRA: leave out {named(lora)}"),
        (settings.audio_dir and "split" in given, f"--split {settings.split} is a part of --data: leave it out"),
        (
            settings.quantize and importlib.util.find_spec("bitsandbytes") is None,
            "--quantize nf4 needs the package bitsandbytes, which is not installed: pip install bitsandbytes",
        ),
    ]


def record_settings(settings):
    """Print the settings as they will be used, and write them to settings.json. Returns them, with versions."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()}
    print("settings: " + " ".join(f"{key}={value}" for key, value in values.items()))
    values["gold"] = ORACLE if settings.oracle else f"gold: written by {settings.llm}, which hears nothing"
    values["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    write_json(settings.output / "settings.json", values)
    return values


def write_json(path, values):
    with files.whole(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def write_lines(path, lines):
    with files.whole(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ----------------------------------------------------------------------------------------------------------------------
# Recordings


@dataclass(frozen=True)
class Sample:
    id: str
    condition: str  # "clean", "noisy" or "all"
    speaker: str  # what is held out together; a file name where nothing is known of speakers
    audio: Callable[[], np.ndarray]  # gives (S,) at 16 kHz
    human: str | None  # what was said, by people


def read_samples(settings):
    """All recordings, checked. Raises InputError with one line for every one that cannot be used."""
    if settings.data:
        utterances = data.read_corpus(settings.data, settings.split, limit=settings.limit)
        return [Sample(u.id, "all", u.speaker, partial(data.read_audio, u.recording), u.text) for u in utterances]
    folders = {name: settings.audio_dir / name for name in CONDITIONS if (settings.audio_dir / name).is_dir()}
    samples, problems = [], []
    for condition, folder in (folders or {"all": settings.audio_dir}).items():
        for path in data.sound_files(folder)[: settings.limit]:
            try:
                data.read_sound_file(path, LONGEST, data.SAMPLE_RATE)
            except cli.InputError as error:
                problems.append(str(error))
            # clean/a.wav and noisy/a.wav are one utterance: neither may be trained on where the other is held out
            name = str(path.relative_to(folder).with_suffix(""))
            samples.append(
                Sample(
                    str(path.relative_to(settings.audio_dir)),
                    condition,
                    name,
                    partial(data.read_sound_file, path, LONGEST),
                    None,
                )
            )
    if problems:
        raise cli.InputError(
            f"{len(problems)} of {len(samples)} recordings of {settings.audio_dir} cannot be used; "
            "repair or remove them:\n  " + "\n  ".join(problems)
        )
    return samples


# ----------------------------------------------------------------------------------------------------------------------
# The recogniser


class Recogniser:
    """Wav2Vec2ForCTC with its processor. One recording at a time goes through it, in evaluation and in training.

    In the base models the first layer is normalised over all frames of a row, padding included, with a mask or without:
    a padded clip has other logits than the same clip alone. Without padding, no result depends on what shares a batch.
    """

    def __init__(self, name, time_mask):
        """name: folder or hub id; time_mask: mask_time_prob. Raises InputError when it cannot be loaded."""
        with loading("recogniser", name, "--recogniser"):
            self.processor = Wav2Vec2Processor.from_pretrained(name)
            self.network, loaded = Wav2Vec2ForCTC.from_pretrained(
                name, use_safetensors=True, dtype=torch.float32, mask_time_prob=time_mask, output_loading_info=True
            )
        missing = set(loaded["missing_keys"])
        if wrong := sorted(missing - MAY_BE_MISSING) + sorted(map(str, loaded["mismatched_keys"])):
            raise cli.InputError(
                f"recogniser {name} lacks {len(wrong)} weights, such as {wrong[0]}: give one that was "
                f"trained to transcribe (Wav2Vec2ForCTC)"
            )
        if missing and time_mask:  # what hidden frames become; never left to what memory held
            torch.nn.init.uniform_(self.network.wav2vec2.masked_spec_embed)
        if (rate := self.processor.feature_extractor.sampling_rate) != data.SAMPLE_RATE:
            raise cli.InputError(f"recogniser {name} hears {rate} Hz: give one for {data.SAMPLE_RATE} Hz")
        tokenizer = self.processor.tokenizer
        self.blank = tokenizer.pad_token_id
        self.letters = {symbol: id for symbol, id in tokenizer.get_vocab().items() if len(symbol) == 1}
        self.letters[" "] = self.letters.pop(tokenizer.word_delimiter_token)
        self.capitals = "E" in self.letters
        self.network.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.network.freeze_feature_encoder()

    def normalise(self, text):
        """A text in the recogniser's alphabet, and Counter of letters and digits that are not in it, which are lost.

        Small letters would be all <unk> for a vocabulary of capitals. Punctuation becomes space.
        """
        text = " ".join(metrics.normalise_words(text))
        text = text if self.capitals else text.lower()
        kept = "".join(character for character in text if character in self.letters)
        return " ".join(kept.split()), Counter(character for character in text if character not in self.letters)

    def encode(self, text):
        """Symbols of a normalised text, a list of C ids."""
        return [self.letters[character] for character in text]

    def frames(self, samples):
        """How many frames a recording of so many samples becomes."""
        return int(self.network._get_feat_extract_output_lengths(samples))

    def logits(self, audio):
        """(S,) -> (F, V), float32."""
        values = self.processor(audio=audio, sampling_rate=data.SAMPLE_RATE, return_tensors="pt").input_values  # (1, S)
        with runtime.autocast():
            return self.network(values.to(self.network.device)).logits[0].float()

    def decode(self, logits):
        """Greedy transcript of (F, V): the likeliest symbol of each frame, runs joined, all but letters removed.

        By hand, because Wav2Vec2CTCTokenizer with skip_special_tokens removes the blank before it joins runs (in
        transformers 5.23), and the two L of HELLO become one.
        """
        characters = {id: character for character, id in self.letters.items()}
        ids = torch.unique_consecutive(logits.argmax(dim=-1)).tolist()
        return " ".join("".join(characters.get(id, "") for id in ids).split())

    @torch.no_grad()
    def transcribe(self, samples, title):
        """Greedy transcripts of samples, in their order."""
        self.network.eval()
        return [self.decode(self.logits(sample.audio())) for sample in tqdm(samples, desc=title, unit="recording")]


@contextmanager
def loading(kind, name, advice):
    """Turns a library's failure to load `name` into an InputError that says what to do."""
    remedy = f"{advice} needs a folder with a checkpoint in safetensors, or a hub id that can be reached"
    if not Path(name).is_dir() and len(Path(name).parts) > 1 and Path(name).parent.is_dir():
        # Not a hub id, which would be asked for again and again where there is no network
        raise cli.InputError(f"{kind} folder {name} does not exist ({remedy})")
    try:
        yield
    except Exception as error:  # four libraries read a checkpoint, and each has its own for a broken one
        raise cli.InputError(f"{kind} {name} cannot be loaded: {cli.first_line(error)} ({remedy})") from error


# ----------------------------------------------------------------------------------------------------------------------
# The language model


class Llm:
    """A chat model that rewrites transcripts, greedily."""

    def __init__(self, name, quantize, max_new_tokens):
        """name: folder or hub id; quantize: None or "nf4". Raises InputError when it cannot be loaded."""
        cuda = torch.cuda.is_available()
        options = {"use_safetensors": True, "dtype": torch.bfloat16 if cuda else torch.float32}
        if quantize:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=options["dtype"],
            )
        with loading("LLM", name, "without an LLM there is no gold: --llm"):
            # Left: an answer continues the last token of its row, which may not be padding
            self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
            self.network = AutoModelForCausalLM.from_pretrained(name, **options)
        if self.tokenizer.chat_template is None:
            raise cli.InputError(f"LLM {name} has no chat template: give --llm an instruction-tuned one")
        if not quantize:
            self.network.to("cuda" if cuda else "cpu")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.ends = ends_of(self.network.generation_config, self.tokenizer)
        self.network.generation_config = GenerationConfig(  # without the checkpoint's temperature and its like
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(self.ends),
        )
        self.network.eval()
        self.rewrite([EXAMPLE])  # the first call is slow, and not what the time of a correction should be

    @torch.no_grad()
    def rewrite(self, transcripts):
        """One answer for each transcript, as written; None for one that did not end in max_new_tokens."""
        chats = [[{"role": "user", "content": PROMPT.format(transcript=transcript)}] for transcript in transcripts]
        inputs = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(self.network.device)
        new = self.network.generate(**inputs)[:, inputs["input_ids"].shape[1] :]  # (B, T)
        ended = [not self.ends.isdisjoint(row) for row in new.tolist()]
        answers = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [answer if whole else None for answer, whole in zip(answers, ended, strict=True)]


def ends_of(generation_config, tokenizer):
    """Ids of the tokens that end an answer: some chat models have several."""
    ids = generation_config.eos_token_id
    return {tokenizer.eos_token_id} if ids is None else set(ids) if isinstance(ids, list) else {ids}


def clean_answer(answer):
    """The sentence in an answer: its first line with words, without what announces it and without quotes around it."""
    lines = [line.strip() for line in answer.splitlines()]
    sentences = [text for line in lines if (text := LABEL.sub("", line).strip(" \"'`*“”‘’"))]
    return sentences[0] if sentences else ""


def check_llm(settings):
    """Load the LLM, show and time one correction."""
    started = time.perf_counter()
    llm = Llm(settings.llm, settings.quantize, settings.max_new_tokens)
    loaded = time.perf_counter()
    (answer,) = llm.rewrite([EXAMPLE])
    seconds = time.perf_counter() - loaded
    print(f"transcript: {EXAMPLE}\nanswer:     {answer!r}\nsentence:   {clean_answer(answer or '')}")
    print(f"loaded in {loaded - started:.1f} s, corrected in {seconds:.2f} s; {runtime.peak_memory():.1f} GB at most")
    if answer is None:
        raise cli.RunError(
            f"the answer did not end within --max-new-tokens {settings.max_new_tokens}: such answers "
            f"are rejected; raise it, or choose an --llm that keeps to one line"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Gold: written once, before anything is trained, and the same for every system that is measured


def write_gold(samples, transcripts, recogniser, llm, settings):
    """gold.jsonl, one line a sample. llm: None takes the human text instead.

    Each line has id, condition, speaker, baseline (the transcript), answer (as the LLM wrote it), gold (None where
    there is none), verdict (why), distance and human; baseline, gold and human are in the recogniser's alphabet.
    Returns the lines, and Counter of the answers' characters outside that alphabet.
    """
    answers = rewrite_all(transcripts, llm, settings) if llm else [sample.human for sample in samples]
    lines, lost = [], Counter()
    for sample, transcript, answer in zip(samples, transcripts, answers, strict=True):
        gold, lost_here = recogniser.normalise(answer if settings.oracle else clean_answer(answer or ""))
        human = recogniser.normalise(sample.human)[0] or None if sample.human else None
        distance = word_distance(transcript, gold)
        trusted = settings.oracle and gold and not lost_here
        verdict = "kept" if trusted else judge(transcript, answer, gold, lost_here, distance, settings.max_distance)
        lost += lost_here
        lines.append(
            {
                "id": sample.id,
                "condition": sample.condition,
                "speaker": sample.speaker,
                "baseline": transcript,
                "answer": answer,
                "gold": gold if verdict == "kept" else None,
                "verdict": verdict,
                "distance": distance,
                "human": human,
            }
        )
    write_lines(settings.output / "gold.jsonl", lines)
    return lines, lost


def rewrite_all(transcripts, llm, settings):
    """An answer for each transcript that is not empty, None for the others and for those that did not end."""
    answers = [None] * len(transcripts)
    # Similar lengths together: little padding
    order = sorted((i for i, text in enumerate(transcripts) if text), key=lambda i: len(transcripts[i]))
    with tqdm(total=len(order), desc="rewriting", unit="transcript") as bar:
        for start in range(0, len(order), settings.llm_batch):
            chosen = order[start : start + settings.llm_batch]
            for i, answer in zip(chosen, llm.rewrite([transcripts[i] for i in chosen]), strict=True):
                answers[i] = answer
            bar.update(len(chosen))
    return answers


def word_distance(transcript, gold):
    """Word errors of a transcript against its gold, per word of the transcript; None for an empty transcript."""
    if not transcript:
        return None
    *errors, length = metrics.error_counts([transcript.split()], [gold.split()])[0]
    return float(sum(errors) / length)


def judge(transcript, answer, gold, lost, distance, max_distance):
    """Whether an LLM's gold is kept, or why not. It heard nothing: what is far from the transcript is its own."""
    if not transcript:
        return "empty transcript"
    if answer is None:
        return "answer did not end"
    if not gold:
        return "empty answer"
    if lost:  # "Room 12" as target would be ROOM: the recogniser would learn to pass over what was said
        return "characters outside the alphabet"
    return "kept" if distance <= max_distance else "too far from the transcript"


def choose_training(lines, samples, recogniser):
    """Samples whose transcript differs from its gold, as (sample, ids of the gold), and ids of those CTC cannot align.

    CTC needs a frame for each symbol and one more between equal neighbours; a time mask needs room for its span.
    """
    by_id, chosen, too_short = {sample.id: sample for sample in samples}, [], []
    config = recogniser.network.config
    span = config.mask_time_length if config.mask_time_prob else 1
    for line in lines:
        if line["gold"] and line["gold"] != line["baseline"]:
            target, sample = recogniser.encode(line["gold"]), by_id[line["id"]]
            needed = len(target) + sum(a == b for a, b in zip(target, target[1:]))
            if recogniser.frames(len(sample.audio())) < max(needed, span):
                too_short.append(sample.id)
            else:
                chosen.append((sample, target))
    return chosen, too_short


# ----------------------------------------------------------------------------------------------------------------------
# Training


def prepare_training(recogniser, settings):
    """Put LoRA into the recogniser, or free all but its feature encoder. Returns what trains, {name: parameter}."""
    if not settings.no_lora:
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=ATTENTION,
            modules_to_save=[HEAD],
        )
        recogniser.network = get_peft_model(recogniser.network, config)
    weights = {name: p for name, p in recogniser.network.named_parameters() if p.requires_grad}
    total = sum(parameter.numel() for parameter in recogniser.network.parameters())
    trained = sum(parameter.numel() for parameter in weights.values())
    print(f"training {trained:,} of {total:,} weights ({trained / total:.2%})")
    return weights


def train(recogniser, chosen, settings):
    """Fine-tune on (sample, target) pairs, and save. Returns what is said of it in the results."""
    started = time.perf_counter()
    weights = prepare_training(recogniser, settings)
    optimiser = torch.optim.AdamW(weights.values(), weight_decay=0.0, fused=True)
    per_epoch = len(data.epoch_steps(len(chosen), settings.batch_size, settings.seed, 1))
    steps = per_epoch * settings.epochs
    step, warmup = 0, math.ceil(settings.warmup * steps)
    with open(settings.output / "log.jsonl", "w") as log, tqdm(total=steps, desc="training", unit="step") as bar:
        for epoch in range(1, settings.epochs + 1):
            for indices in data.epoch_steps(len(chosen), settings.batch_size, settings.seed, epoch):
                rate = runtime.learning_rate(step, steps, settings.learning_rate, warmup)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                step += 1
                numbers = train_step(recogniser, weights, optimiser, [chosen[i] for i in indices], step, settings.clip)
                line = {"step": step, "epoch": epoch, "learning_rate": rate, **numbers}
                print(json.dumps(line), file=log, flush=True)
                bar.update()
                bar.set_postfix_str(f"loss {numbers['loss']:.3f} gradient {numbers['gradient_norm']:.2f}")
                if step == ESTIMATE_AFTER and step < steps:
                    rest = (time.perf_counter() - started) / step * (steps - step)
                    bar.write(
                        f"{step} steps: about {timedelta(seconds=round(rest))} (h:mm:ss) for the other "
                        f"{steps - step}, without the evaluation"
                    )
    path = save(recogniser, settings)
    return {
        "samples": len(chosen),
        "epochs": settings.epochs,
        "steps": steps,
        "trained_weights": sum(parameter.numel() for parameter in weights.values()),
        "seconds": time.perf_counter() - started,
        "path": str(path),
    }


def train_step(recogniser, weights, optimiser, batch, number, clip):
    """One update. Returns what is logged of it. Raises RunError before the update when loss or gradient is not finite.

    Gradient: the mean over all characters of the step. Samples go through the model alone, without padding and so
    without masks and ignored labels, and each adds its sum over characters, so no sample counts for more because of
    which others are in the step.
    """
    recogniser.network.train()
    characters = sum(len(target) for _, target in batch)
    losses = []
    for sample, target in batch:
        loss = ctc_loss(recogniser.logits(sample.audio()), target, recogniser.blank) / characters
        loss.backward()
        losses.append(loss.item())
    not_finite = partial(step_not_finite, number, [sample.id for sample, _ in batch], losses)
    norm = runtime.update(optimiser, weights.values(), sum(losses), clip, not_finite)
    return {"loss": sum(losses), "gradient_norm": norm, "characters": characters}


def ctc_loss(logits, target, blank):
    """Negative log probability of a target, (C,) ids, given logits (F, V), over all alignments; a sum, not a mean."""
    target = torch.tensor(target, device=logits.device)
    lengths = torch.tensor(len(logits)), torch.tensor(len(target))
    return F.ctc_loss(logits.log_softmax(dim=-1), target, *lengths, blank=blank, reduction="sum")


def step_not_finite(number, ids, losses, loss, norm):
    suspects = [id for id, value in zip(ids, losses) if not math.isfinite(value)] or ids
    return cli.RunError(
        f"step {number}: loss {loss:.4g}, gradient norm {norm:.4g}; the step was not applied. It comes "
        f"from one of: {', '.join(suspects)}; lower --learning-rate, or leave them out"
    )


def save(recogniser, settings):
    """Write adapter/ (PEFT's format, the head in it) or model/, with the processor, whole or not at all."""
    path = settings.output / ("model" if settings.no_lora else "adapter")
    options = {} if settings.no_lora else {"save_embedding_layers": False}  # there are none, so no look at the hub
    with files.whole(path) as temporary:
        recogniser.network.save_pretrained(temporary, **options)
        recogniser.processor.save_pretrained(temporary)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def compare(lines, reference, before, after):
    """Texts before and after against a reference, with bootstrap intervals over speakers; None where there is no line.

    lines: dicts with speaker and, by these three names, texts; those without the reference are left out. Error rates
    are pooled: errors over all words (WER) or characters, spaces among them (CER). The difference is after - before.
    """
    lines = [line for line in lines if line[reference] is not None]
    if not lines:
        return None
    speakers = [line["speaker"] for line in lines]
    result, errors, lengths = {"samples": len(lines), "speakers": len(set(speakers))}, {}, 0
    for name in (before, after):
        words, characters = (
            metrics.error_counts(*([cut(line[key]) for line in lines] for key in (reference, name)))  # (N, 4)
            for cut in (str.split, lambda text: list(text.replace(" ", "|")))
        )
        errors[name], lengths = words[:, :3].sum(axis=1), words[:, 3]
        wrong = sum(line[reference] != line[name] for line in lines)
        result[name] = {
            "wer": errors[name].sum() / lengths.sum(),
            "cer": characters[:, :3].sum() / characters[:, 3].sum(),
            "error_samples": wrong,
            "error_rate": wrong / len(lines),
            "empty": sum(not line[name] for line in lines),
        }
    drawn = metrics.resampled_sums(errors | {"words": lengths}, speakers, set(speakers))
    rates = {name: drawn[name] / drawn["words"] for name in (before, after)}
    for name in rates:
        result[name]["wer_interval"] = metrics.interval(rates[name])
    change = {rate: result[after][rate] - result[before][rate] for rate in ("wer", "cer")}
    relative = {
        f"{rate}_relative": change[rate] / result[before][rate] if result[before][rate] else None for rate in change
    }
    samples = rates[after] - rates[before]
    result["difference"] = (
        change | relative | {"wer_interval": metrics.interval(samples), "wer_pvalue": metrics.sign_pvalue(samples)}
    )
    return result


def evaluate(training, held_out, settings):
    """All numbers on the held-out lines, and how good the gold is on both parts, by condition and reference."""
    # With --oracle the gold is the human text, so one reference is enough and its own quality says nothing
    references = ["human"] if settings.oracle else ["gold", "human"]
    conditions = sorted({line["condition"] for line in held_out})
    parts = {"all": held_out} | {
        name: [line for line in held_out if line["condition"] == name] for name in conditions if len(conditions) > 1
    }
    with_gold = {"training": training, "held_out": held_out} if not settings.oracle else {}
    return {
        "held_out": {
            part: {reference: compare(lines, reference, "baseline", "tuned") for reference in references}
            for part, lines in parts.items()
        },
        "gold_quality": {
            part: compare([line for line in lines if line["gold"]], "human", "baseline", "gold")
            for part, lines in with_gold.items()
        },
    }


def show(results, groups):
    """Print the tables. groups: what was held out together, "speakers" or "file names"."""
    print(f"\n{results['gold']}")
    for part, by_reference in results["held_out"].items():
        for reference, numbers in by_reference.items():
            show_comparison(f"held out, {part}, against {reference} text", numbers, "baseline", "tuned", groups)
    for part, numbers in results["gold_quality"].items():
        show_comparison(f"how good the gold is, {part}, against human text", numbers, "baseline", "gold", groups)
    print(f"\ncounts: {in_words(results['counts'])}")


def in_words(counts):
    return ", ".join(f"{name} {value:,}" for name, value in counts.items() if isinstance(value, int))


def show_comparison(title, numbers, before, after, groups):
    if numbers is None:
        return
    print(f"\n{title}: {numbers['samples']:,} samples of {numbers['speakers']} {groups}")
    for name in (before, after):
        low, high = numbers[name]["wer_interval"]
        of = numbers[name]
        print(
            f"  {name:10} WER {of['wer']:6.3f} [{low:6.3f}, {high:6.3f}]  CER {of['cer']:6.3f}  "
            f"with errors {of['error_samples']:,} ({of['error_rate']:.1%}), empty {of['empty']:,}"
        )
    change = numbers["difference"]
    low, high = change["wer_interval"]
    relative = f", {change['wer_relative']:+.1%} of the first" if change["wer_relative"] is not None else ""
    print(
        f"  difference WER {change['wer']:+6.3f} [{low:+.3f}, {high:+.3f}], p {change['wer_pvalue']:.3f}{relative};  "
        f"CER {change['cer']:+.3f}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# A recogniser for a laptop


def write_tiny(folder, seed):
    """A small Wav2Vec2ForCTC with real processor and vocabulary, as a checkpoint folder. Its weights are random.

    Only the feature encoder, which never trains here, is set to something: its first layer to band-pass filters of four
    phases, evenly spaced in mel, its second to their mean over 40 ms. So it hears how loud each band is.
    """
    if folder.exists():
        raise cli.InputError(f"{folder} exists already: remove it, or choose another folder for --write-tiny")
    torch.manual_seed(seed)
    bands, kernel, hop, mean = 32, 400, 80, 8  # samples, samples, frames of the first layer
    network = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=len(SYMBOLS),
            pad_token_id=SYMBOLS.index("<pad>"),
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=384,
            conv_dim=(4 * bands, bands),
            conv_kernel=(kernel, mean),
            conv_stride=(hop, mean),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            do_stable_layer_norm=True,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
            final_dropout=0.0,
            layerdrop=0.0,
            mask_time_length=5,
        )
    )
    # Ends of overlapping bands in Hz, up to 7 kHz
    edges = 700 * (10 ** (np.linspace(0, 2595 * math.log10(1 + 7000 / 700), bands + 2) / 2595) - 1)
    seconds = np.arange(kernel) / data.SAMPLE_RATE
    with torch.no_grad():
        first, second = (layer.conv.weight for layer in network.wav2vec2.feature_extractor.conv_layers)
        second.zero_()
        for band, centre in enumerate(edges[1:-1]):
            length = min(kernel, int(4 * data.SAMPLE_RATE / (edges[band + 2] - edges[band])))
            window = np.pad(np.hanning(length), ((kernel - length) // 2, kernel - length - (kernel - length) // 2))
            for phase in range(4):
                wave = window * np.cos(2 * np.pi * centre * seconds + phase * np.pi / 2)
                first[4 * band + phase, 0] = torch.from_numpy(wave)
            second[band, 4 * band : 4 * band + 4] = 1 / mean
    with files.whole(folder) as temporary:
        network.save_pretrained(temporary)
        (temporary / "vocab.json").write_text(json.dumps({symbol: id for id, symbol in enumerate(SYMBOLS)}))
        tokenizer = Wav2Vec2CTCTokenizer(str(temporary / "vocab.json"))
        Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(temporary)
    print(f"{folder}: {network.num_parameters():,} weights, random: it knows nothing yet")


# ----------------------------------------------------------------------------------------------------------------------
# All of it


def run(settings):
    """Transcribe, rewrite, train, measure. Raises InputError before anything slow when the input is wrong."""
    if (settings.output / "settings.json").exists():
        raise cli.InputError(f"{settings.output} holds a run already: choose another --output, or remove it")
    samples = read_samples(settings)
    training, held_out = data.hold_out_speakers(samples, settings.validation, settings.seed)
    files.make_folder(settings.output, "--output")
    torch.manual_seed(settings.seed)
    np.random.seed(settings.seed)  # time masks are drawn from it
    recogniser = Recogniser(settings.recogniser, settings.time_mask)
    llm = None if settings.oracle else Llm(settings.llm, settings.quantize, settings.max_new_tokens)
    record = record_settings(settings)
    groups = "speakers" if settings.data else "file names"
    print(f"{len(samples):,} recordings; {len(held_out):,} of {len({s.speaker for s in held_out})} {groups} held out")

    transcripts = recogniser.transcribe(samples, "transcribing")
    lines, lost = write_gold(samples, transcripts, recogniser, llm, settings)
    del llm  # its memory is needed
    held_out_ids = {sample.id for sample in held_out}
    parts = {
        name: [line for line in lines if (line["id"] in held_out_ids) == (name == "held_out")]
        for name in ("training", "held_out")
    }
    chosen, too_short = choose_training(parts["training"], samples, recogniser)
    counts = count(lines, parts, chosen, too_short, lost)
    if len(chosen) < FEWEST:
        raise cli.RunError(
            f"{len(chosen)} samples to train on, and {FEWEST} are the fewest ({in_words(counts)}): use "
            f"more recordings; what became of each is in {settings.output}/gold.jsonl"
        )
    if len(chosen) < FEW:
        print(f"only {len(chosen)} samples to train on: expect nothing of it")

    trained = train(recogniser, chosen, settings)
    tuned = recogniser.transcribe(held_out, "transcribing again")
    for line, text in zip(parts["held_out"], tuned, strict=True):
        line["tuned"] = text
    write_lines(settings.output / "held_out.jsonl", parts["held_out"])
    results = {
        "gold": record["gold"],
        **evaluate(**parts, settings=settings),
        "counts": counts,
        "training": trained,
        "settings": record,
    }
    write_json(settings.output / "evaluation_results.json", results)
    show(results, groups)
    print(f"trained in {trained['seconds']:.0f} s: {trained['path']}; all numbers: evaluation_results.json beside it")


def count(lines, parts, chosen, too_short, lost):
    """What became of the samples, for the results."""
    verdicts = Counter(line["verdict"] for line in lines)
    return {
        "recordings": len(lines),
        **{name: len(part) for name, part in parts.items()},
        "empty transcripts": sum(not line["baseline"] for line in lines),
        "gold kept": verdicts.pop("kept", 0),
        **{f"gold rejected: {verdict}": number for verdict, number in verdicts.items()},
        "trained on": len(chosen),
        "CTC cannot align": len(too_short),
        "not aligned": too_short,
        "characters outside the alphabet": sum(lost.values()),
        "which": [f"{character!r} x {number}" for character, number in lost.most_common()],
    }


def main():
    """Errors of the user and of the run end with one line and the exit codes 2 and 1."""
    settings = parse_settings()
    if settings.write_tiny:
        write_tiny(settings.write_tiny, settings.seed)
    elif settings.check_llm:
        check_llm(settings)
    else:
        run(settings)


if __name__ == "__main__":
    cli.run_script("gold_transcripts.py", main)
