"""Better speech recognition from transcripts that a language model corrected (wav2vec2, LoRA).

    python -m recipes.gold_transcripts --audio-dir recordings                       # with recordings/clean and /noisy
    python -m recipes.gold_transcripts --data speechocean762 --quantize nf4         # human text to compare with
    python -m recipes.gold_transcripts --write-tiny tiny-wav2vec2                   # a recogniser for a laptop, then:
    python -m recipes.gold_transcripts --recogniser tiny-wav2vec2 --data speechocean762 --oracle --no-lora \
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

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
import json
import math
from pathlib import Path
import re
import time
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers

import data
import metrics
from recipes import common
from support import cli, files, pretrained, sound
from support.files import write_json

COMMAND = "recipes.gold_transcripts"


@dataclass
class Settings:
    """A source in brackets: the first authors' document or public code, or our choice."""

    audio_dir: Path | None = None  # recordings without text; clean/ and noisy/ in it are reported apart (document)
    data: str | None = None  # corpus with human text instead: speechocean762's folder or its hub id
    data_reader: Path | None = None  # Python file that reads another layout: docs/own-data.md
    split: Literal["train", "test"] = "train"  # part of --data
    limit: cli.Count | None = None  # only the first N recordings, of clean/ and noisy/ each (document: 100)
    validation: cli.Fraction = 0.2  # share of speakers, or file names, to measure on (public code: of error samples)

    llm: str = "mistralai/Mistral-7B-Instruct-v0.3"  # folder or hub id of a chat model (document)
    quantize: Literal["nf4"] | None = None  # keep the LLM in 4 bits (document)
    max_new_tokens: cli.Count = 128  # an answer that is longer is rejected (document)
    llm_batch: cli.Count = 8  # transcripts rewritten at once (our choice)
    max_distance: cli.Positive = 0.5  # gold with more word errors per transcript word is rejected (our choice)
    oracle: bool = False  # take the human text of --data as gold instead of asking an LLM: the best that gold can be

    recogniser: str = "facebook/wav2vec2-base-960h"  # folder or hub id, Wav2Vec2ForCTC (document)
    no_lora: bool = False  # train all weights but the feature encoder's (document)
    rank: cli.Count = 8  # of LoRA (document)
    alpha: cli.Count = 16  # of LoRA, scale alpha / rank (document)
    dropout: cli.Fraction = 0.1  # of LoRA's input (public code)
    time_mask: cli.Fraction = 0.05  # share of frames hidden in training, SpecAugment (wav2vec2-base-960h's)
    write_tiny: Path | None = None  # write a small recogniser with random weights into this folder, and end

    epochs: cli.Count = 3  # passes over the error samples (document)
    batch_size: cli.Count = 4  # samples in a step (document)
    learning_rate: cli.Positive = 3e-5  # peak (document)
    warmup: cli.Fraction = 0.1  # share of steps with linear warmup, then cosine (our choice)
    clip: cli.Positive = 1.0  # largest norm of a step's gradient (public code)

    seed: cli.Seed = 42  # of held-out speakers, weights, order, dropout (public code)
    output: Path = Path("out-gold")  # folder for all that is written


CONDITIONS = ("clean", "noisy")  # folders of --audio-dir (document)
LONGEST = 30.0  # seconds of a recording; our choice: attention's memory grows with the square
BANDS, KERNEL, HOP, MEAN = 32, 400, 80, 8  # of the tiny recogniser's ears: number, samples, samples, frames
FEWEST = 2  # samples to train on (public code)
ATTENTION = r".*encoder\.layers\.\d+\.attention\.(q|k|v|out)_proj"  # gets LoRA (public code)
HEAD = "lm_head"  # of the recogniser; LoRA leaves it frozen unless it is named, and then saves it too
RESULTS = "evaluation_results.json"
COUNTED = ("error_samples", "empty")  # of a text, in the tables
ORACLE = "oracle gold: human text, not an LLM"

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


def check(settings: Settings) -> None:
    """Raises InputError for settings that cannot work together."""
    if settings.write_tiny:
        common.refuse_unused(settings, "write_tiny", "seed")
    elif bool(settings.audio_dir) == bool(settings.data):
        raise cli.InputError("give --audio-dir, recordings, or --data, a corpus with human text: one of the two")
    elif settings.oracle and settings.audio_dir:
        raise cli.InputError("--oracle takes human text, and --audio-dir has none: give --data, or an LLM with --llm")


@dataclass(frozen=True)
class Sample:
    id: str
    condition: str  # "clean", "noisy" or "all"
    speaker: str  # what is held out together; a file name where nothing is known of speakers
    audio: Callable[[], np.ndarray]  # gives (S,) at 16 kHz
    human: str | None  # what was said, by people


def read_samples(settings: Settings) -> list[Sample]:
    """All recordings, checked. Raises InputError with one line for every one that cannot be used."""
    if settings.data:
        folder, _ = data.find_corpus(settings.data, None)
        utterances = data.read_corpus(folder, settings.split, settings.limit, settings.data_reader)
        return [Sample(u.id, "all", u.speaker, partial(sound.read_audio, u.recording), u.text) for u in utterances]
    root = settings.audio_dir
    folders = {name: root / name for name in CONDITIONS if (root / name).is_dir()} or {"all": root}
    samples = []
    for condition, folder in folders.items():
        for path in sound.sound_files(folder)[: settings.limit]:
            # clean/a.wav and noisy/a.wav are one utterance: neither may be trained on where the other is held out
            name = str(path.relative_to(folder).with_suffix(""))
            samples.append(Sample(str(path.relative_to(root)), condition, name, partial(read_recording, path), None))
    common.every([(sample.id, sample) for sample in samples], lambda sample: len(sample.audio()), f"files of {root}")
    return samples


def read_recording(path):
    return sound.read_own(files.read_bytes(path), LONGEST, data.SAMPLE_RATE)[0]


# ----------------------------------------------------------------------------------------------------------------------
# The recogniser


class Recogniser:
    """Wav2Vec2ForCTC with its processor. One recording at a time goes through it, in evaluation and in training.

    In the base models the first layer is normalised over all frames of a row, padding included, with a mask or without:
    a padded clip has other logits than the same clip alone. Without padding, no result depends on what shares a batch.
    """

    def __init__(self, name, time_mask):
        """name: folder or hub id; time_mask: mask_time_prob. Raises InputError when it cannot be loaded."""
        classes = transformers.Wav2Vec2ForCTC, transformers.Wav2Vec2Processor
        self.network, self.processor = common.load(*classes, name, torch.float32, mask_time_prob=time_mask)
        tokenizer, rate = self.processor.tokenizer, self.processor.feature_extractor.sampling_rate
        with pretrained.loading(name):  # a vocabulary may lack space or blank
            self.letters = {symbol: id for symbol, id in tokenizer.get_vocab().items() if len(symbol) == 1}
            self.letters[" "] = self.letters.pop(tokenizer.word_delimiter_token)
            self.blank, self.capitals = tokenizer.pad_token_id, "E" in self.letters
            common.check_ids([*self.letters.values(), self.blank], self.network.config.vocab_size, name)
        if rate != data.SAMPLE_RATE:
            raise cli.InputError(f"--recogniser {name} hears {rate} Hz: give one for {data.SAMPLE_RATE} Hz")
        self.network.eval()
        self.network.freeze_feature_encoder()

    def normalise(self, text):
        """A text in the recogniser's alphabet, and the letters and digits that are not in it, which are lost.

        Small letters would be all <unk> for a vocabulary of capitals. Punctuation becomes space.
        """
        text = " ".join(metrics.normalise_words(text))
        text = text if self.capitals else text.lower()
        kept = "".join(character for character in text if character in self.letters)
        return " ".join(kept.split()), "".join(character for character in text if character not in self.letters)

    def encode(self, text):
        """Symbols of a normalised text, a list of C ids."""
        return [self.letters[character] for character in text]

    def logits(self, audio):
        """(S,) -> (F, V), float32."""
        values = self.processor(audio=audio, sampling_rate=data.SAMPLE_RATE, return_tensors="pt").input_values  # (1, S)
        with common.autocast():
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
        return [
            self.decode(self.logits(sample.audio())) for sample in cli.Progress(samples, desc=title, unit="recording")
        ]


# ----------------------------------------------------------------------------------------------------------------------
# The language model


class Llm:
    """A chat model that rewrites transcripts, greedily."""

    def __init__(self, name, quantize, max_new_tokens):
        """name: folder or hub id; quantize: None or "nf4". Raises InputError when it cannot be loaded."""
        classes = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
        dtype = torch.bfloat16 if common.DEVICE == "cuda" else torch.float32
        self.network, self.tokenizer = common.load(*classes, name, dtype, bool(quantize))
        if self.tokenizer.chat_template is None:
            raise cli.InputError(f"--llm {name} has no chat template: give an instruction-tuned one")
        common.check_ids(self.tokenizer.get_vocab().values(), self.network.get_input_embeddings().num_embeddings, name)
        self.network.eval()
        self.tokenizer.padding_side = "left"  # an answer continues the last token of its row, which may not be padding
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        ends = self.network.generation_config.eos_token_id  # some chat models have several
        self.ends = set(np.atleast_1d(self.tokenizer.eos_token_id if ends is None else ends).tolist())
        ids = {"pad_token_id": self.tokenizer.pad_token_id, "eos_token_id": sorted(self.ends)}
        greedy = transformers.GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, **ids)
        self.network.generation_config = greedy  # without the checkpoint's temperature and its like

    @torch.no_grad()
    def rewrite(self, transcripts):
        """One answer for each transcript, as written; None for one that did not end in max_new_tokens."""
        chats = [[{"role": "user", "content": PROMPT.format(transcript=transcript)}] for transcript in transcripts]
        options = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
        inputs = self.tokenizer.apply_chat_template(chats, **options).to(self.network.device)
        new = self.network.generate(**inputs)[:, inputs["input_ids"].shape[1] :]  # (B, T)
        ended = [not self.ends.isdisjoint(row) for row in new.tolist()]
        answers = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [answer if whole else None for answer, whole in zip(answers, ended, strict=True)]


def clean_answer(answer):
    """The sentence in an answer: its first line with words, without what announces it and without quotes around it."""
    lines = [line.strip() for line in answer.splitlines()]
    sentences = [text for line in lines if (text := LABEL.sub("", line).strip(" \"'`*“”‘’"))]
    return sentences[0] if sentences else ""


# ----------------------------------------------------------------------------------------------------------------------
# Gold: written once, before anything is trained, and the same for every system that is measured


def write_gold(samples, transcripts, recogniser, llm, settings):
    """gold.jsonl, one line a sample, as dicts; llm: None takes the human text instead.

    baseline (the transcript), gold (None where there is none) and human are in the recogniser's alphabet, answer is as
    the LLM wrote it, verdict says why there is gold or none.
    """
    answers = rewrite_all(transcripts, llm, settings) if llm else [sample.human for sample in samples]
    lines = []
    for sample, transcript, answer in zip(samples, transcripts, answers, strict=True):
        gold, lost = recogniser.normalise(answer if settings.oracle else clean_answer(answer or ""))
        human = recogniser.normalise(sample.human)[0] or None if sample.human else None
        distance = metrics.error_rate([transcript.split()], [gold.split()]) if transcript else None
        trusted = settings.oracle and gold and not lost
        verdict = "kept" if trusted else judge(transcript, answer, gold, lost, distance, settings.max_distance)
        of = {"id": sample.id, "condition": sample.condition, "speaker": sample.speaker, "baseline": transcript}
        of |= {"answer": answer, "gold": gold if verdict == "kept" else None, "verdict": verdict}
        lines.append(of | {"distance": distance, "human": human})
    common.write_lines(settings.output / "gold.jsonl", lines)
    return lines


def rewrite_all(transcripts, llm, settings):
    """An answer for each transcript that is not empty, None for the others and for those that did not end."""
    # Similar lengths together: little padding
    order = sorted((i for i, text in enumerate(transcripts) if text), key=lambda i: len(transcripts[i]))
    answers, size = [None] * len(transcripts), settings.llm_batch
    for start in cli.Progress(range(0, len(order), size), desc="rewriting", unit="batch"):
        chosen = order[start : start + size]
        for i, answer in zip(chosen, llm.rewrite([transcripts[i] for i in chosen]), strict=True):
            answers[i] = answer
    return answers


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

    A time mask needs room for its span.
    """
    chosen, too_short = [], []
    config = recogniser.network.config
    span = config.mask_time_length if config.mask_time_prob else 1
    for line, sample in zip(lines, samples, strict=True):
        if line["gold"] and line["gold"] != line["baseline"]:
            target = recogniser.encode(line["gold"])
            frames = recogniser.network._get_feat_extract_output_lengths(len(sample.audio()))
            if frames < max(common.frames_needed(target), span):
                too_short.append(sample.id)
            else:
                chosen.append((sample, target))
    return chosen, too_short


# ----------------------------------------------------------------------------------------------------------------------
# Training and evaluation


def train(recogniser: Recogniser, chosen: list, settings: Settings) -> dict:
    """Fine-tune on (sample, target) pairs, and save. Returns what is said of it in the results."""
    if not settings.no_lora:
        recogniser.network = common.add_lora(recogniser.network, settings, ATTENTION, modules_to_save=[HEAD])
    parts, started, where = partial(losses, recogniser), time.perf_counter(), (settings.seed, settings.output)
    steps = common.fine_tune(recogniser.network, chosen, settings.batch_size, parts, settings, *where)
    path, seconds = settings.output / ("model" if settings.no_lora else "adapter"), time.perf_counter() - started
    common.save(recogniser.network, path, recogniser.processor)
    return {"samples": len(chosen), "steps": steps, "seconds": seconds, "path": str(path)}


def losses(recogniser, step):
    """The (ids, loss) of a step's (sample, target) pairs, one sample at a time; the gradient: the mean over characters.

    Samples go through the model alone, without padding and so without masks and ignored labels, and each adds its sum
    over characters, so no sample counts for more because of which others are in the step.
    """
    characters = sum(len(target) for _, target in step)
    for sample, target in step:
        yield [sample.id], ctc_loss(recogniser.logits(sample.audio()), target, recogniser.blank) / characters


def ctc_loss(logits, target, blank):
    """Negative log probability of a target, (C,) ids, given logits (F, V), over all alignments; a sum, not a mean."""
    target = torch.tensor(target, device=logits.device)
    lengths = torch.tensor(len(logits)), torch.tensor(len(target))
    return F.ctc_loss(logits.log_softmax(dim=-1), target, *lengths, blank=blank, reduction="sum")


def compare(lines, reference, before, after):
    """Texts before and after against a reference, with bootstrap intervals over speakers; None where there is no line.

    lines: dicts with speaker and, by these three names, texts; those without the reference are left out. Error rates
    are pooled: errors over all words (WER) or characters, spaces among them (CER). The difference is after - before.
    """
    lines = [line for line in lines if line[reference] is not None]
    if not lines:
        return None
    speakers, rates = [line["speaker"] for line in lines], {}
    result = {"samples": len(lines), "speakers": len(set(speakers))}
    for name in (before, after):
        words, letters = (
            metrics.error_counts(*([cut(line[key]) for line in lines] for key in (reference, name)))  # (N, 4)
            for cut in (str.split, lambda text: list(text.replace(" ", "|")))
        )
        wrong = sum(line[reference] != line[name] for line in lines)
        rates[name] = common.resampled_ratio(words[:, :3].sum(axis=1), words[:, 3], speakers)
        result[name] = {
            "wer": words[:, :3].sum() / words[:, 3].sum(),
            "cer": letters[:, :3].sum() / letters[:, 3].sum(),
            "error_samples": wrong,
            "error_rate": wrong / len(lines),
            "empty": sum(not line[name] for line in lines),
            "wer_interval": metrics.interval(rates[name]),
        }
    difference, gain = {}, rates[after] - rates[before]
    for rate in ("wer", "cer"):
        first, change = result[before][rate], result[after][rate] - result[before][rate]
        difference |= {rate: change, f"{rate}_relative": change / first if first else None}
    difference |= {"wer_interval": metrics.interval(gain), "wer_pvalue": metrics.sign_pvalue(gain)}
    return result | {"difference": difference}


def evaluate(training, held_out, settings):
    """Print and return all numbers on the held-out lines by condition and reference, and of the gold on both parts."""
    # With --oracle the gold is the human text, so one reference is enough and its own quality says nothing
    references = ["human"] if settings.oracle else ["gold", "human"]
    conditions = sorted({line["condition"] for line in held_out})
    parts = {"all": held_out}
    for name in conditions if len(conditions) > 1 else []:
        parts[name] = [line for line in held_out if line["condition"] == name]
    measured, quality = {}, {}
    for part, lines in parts.items():
        measured[part] = {reference: compare(lines, reference, "baseline", "tuned") for reference in references}
        for reference, numbers in measured[part].items():
            show(f"held out, {part}, against {reference} text", numbers, settings)
    for part, lines in {} if settings.oracle else {"training": training, "held_out": held_out}.items():
        quality[part] = compare([line for line in lines if line["gold"]], "human", "baseline", "gold")
        show(f"how good the gold is, {part}, against human text", quality[part], settings)
    return {"held_out": measured, "gold_quality": quality}


def held_out_by(settings):
    return "speakers" if settings.data else "file names"


def show(title, numbers, settings):
    if numbers is None:
        return
    rows = []
    for name, of in numbers.items():
        if isinstance(of, dict):
            sign, counts = "+" if name == "difference" else "", [str(of.get(key, "")) for key in COUNTED]
            interval = " to ".join(f"{value:{sign}.3f}" for value in of["wer_interval"])
            pvalue = f"{of['wer_pvalue']:.3f}" if "wer_pvalue" in of else ""
            rows.append((name, [f"{of['wer']:{sign}.3f}", interval, pvalue, f"{of['cer']:{sign}.3f}", *counts]))
    caption = f"{title}: {numbers['samples']:,} samples of {numbers['speakers']} {held_out_by(settings)}"
    cli.show_table(caption, ["WER", "95 %", "p", "CER", "with errors", "empty"], rows)


def in_words(counts):
    return ", ".join(f"{name} {value:,}" for name, value in counts.items() if isinstance(value, int))


# ----------------------------------------------------------------------------------------------------------------------
# A recogniser for a laptop


def write_tiny(folder, seed):
    """A small Wav2Vec2ForCTC with real processor and vocabulary, as a checkpoint folder. Its weights are random.

    Only the feature encoder, which never trains here, is set to something: see `hear_bands`.
    """
    if folder.exists():
        raise cli.InputError(f"{folder} exists already: remove it, or choose another folder for --write-tiny")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 384}
    encoder = {"conv_dim": (4 * BANDS, BANDS), "conv_kernel": (KERNEL, MEAN), "conv_stride": (HOP, MEAN)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "do_stable_layer_norm": True}
    dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
    off = dict.fromkeys((*dropouts, "layerdrop"), 0.0) | {"mask_time_length": 5}
    symbols = {"vocab_size": len(SYMBOLS), "pad_token_id": SYMBOLS.index("<pad>")}
    network = transformers.Wav2Vec2ForCTC(
        transformers.Wav2Vec2Config(**symbols, **sizes, **encoder, **positions, **off)
    )
    hear_bands(*(layer.conv.weight for layer in network.wav2vec2.feature_extractor.conv_layers))
    with files.whole(folder) as temporary:
        network.save_pretrained(temporary)
        (temporary / "vocab.json").write_text(json.dumps({symbol: id for id, symbol in enumerate(SYMBOLS)}))
        tokenizer = transformers.Wav2Vec2CTCTokenizer(str(temporary / "vocab.json"))
        transformers.Wav2Vec2Processor(transformers.Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(temporary)
    cli.say(f"{folder}: {network.num_parameters():,} weights, random: it knows nothing yet")


@torch.no_grad()
def hear_bands(first, second):
    """Set the first layer to band-pass filters of four phases, evenly spaced in mel, the second to means over 40 ms."""
    # Ends of overlapping bands in Hz, up to 7 kHz
    edges = 700 * (10 ** (np.linspace(0, 2595 * math.log10(1 + 7000 / 700), BANDS + 2) / 2595) - 1)
    seconds = np.arange(KERNEL) / data.SAMPLE_RATE
    second.zero_()
    for band, centre in enumerate(edges[1:-1]):
        length = min(KERNEL, int(4 * data.SAMPLE_RATE / (edges[band + 2] - edges[band])))
        window = np.pad(np.hanning(length), ((KERNEL - length) // 2, KERNEL - length - (KERNEL - length) // 2))
        for phase in range(4):
            wave = window * np.cos(2 * np.pi * centre * seconds + phase * np.pi / 2)
            first[4 * band + phase, 0] = torch.from_numpy(wave)
        second[band, 4 * band : 4 * band + 4] = 1 / MEAN


# ----------------------------------------------------------------------------------------------------------------------
# All of it


def run(settings: Settings) -> None:
    """Transcribe, rewrite, train, measure. Raises InputError before anything slow when the input is wrong."""
    writes = ["gold.jsonl", "log.jsonl", "held_out.jsonl", "adapter", "model"]
    with common.new_run(settings, COMMAND, RESULTS, writes, "torch", "transformers", "peft") as record:
        samples = read_samples(settings)
        training, held_out = data.hold_out_speakers(samples, settings.validation, settings.seed)
        torch.manual_seed(settings.seed)
        np.random.seed(settings.seed)  # time masks are drawn from it
        recogniser = Recogniser(settings.recogniser, settings.time_mask)
        llm = None if settings.oracle else Llm(settings.llm, settings.quantize, settings.max_new_tokens)
        speakers = len({sample.speaker for sample in held_out})
        cli.say(f"{len(samples):,} recordings; {len(held_out):,} of {speakers} {held_out_by(settings)} held out")

        transcripts = recogniser.transcribe(samples, "transcribing")
        lines = write_gold(samples, transcripts, recogniser, llm, settings)
        del llm  # its memory is needed
        by_id = {line["id"]: line for line in lines}
        parts = [[by_id[sample.id] for sample in part] for part in (training, held_out)]
        chosen, too_short = choose_training(parts[0], training, recogniser)
        counts = count(lines, parts, chosen, too_short)
        if len(chosen) < FEWEST:
            raise cli.RunError(
                f"{len(chosen)} samples to train on, and {FEWEST} are the fewest ({in_words(counts)}): use "
                f"more recordings; what became of each is in {settings.output}/gold.jsonl"
            )

        trained = train(recogniser, chosen, settings)
        tuned = recogniser.transcribe(held_out, "transcribing again")
        lines = [line | {"tuned": text} for line, text in zip(parts[1], tuned, strict=True)]
        common.write_lines(settings.output / "held_out.jsonl", lines)
        gold = ORACLE if settings.oracle else f"gold: written by {settings.llm}, which hears nothing"
        cli.say("", gold)
        results = {"gold": gold, **evaluate(parts[0], lines, settings), "counts": counts}
        results |= {"training": trained, "settings": record}
        write_json(settings.output / RESULTS, results)
        cli.say(
            "",
            in_words(counts),
            f"trained in {trained['seconds']:.0f} s: {trained['path']}; all numbers: {RESULTS} beside it",
        )


def count(lines, parts, chosen, too_short):
    """What became of the samples, for the results."""
    verdicts = Counter(line["verdict"] for line in lines)
    return {
        "recordings": len(lines),
        "training": len(parts[0]),
        "held_out": len(parts[1]),
        "empty transcripts": sum(not line["baseline"] for line in lines),
        "gold kept": verdicts.pop("kept", 0),
        **{f"gold rejected: {verdict}": number for verdict, number in verdicts.items()},
        "trained on": len(chosen),
        "CTC cannot align": len(too_short),
        "not aligned": too_short,
    }


def main() -> None:
    settings = cli.parse(Settings, __doc__.split("\n", 1)[0])
    check(settings)
    pretrained.quieten()
    if settings.write_tiny:
        write_tiny(settings.write_tiny, settings.seed)
    else:
        run(settings)


if __name__ == "__main__":
    cli.run_script(COMMAND, main)
