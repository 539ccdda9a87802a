"""Is there human speech in this clip? Qwen2-Audio with LoRA answers A (SPEECH) or B (NONSPEECH).

    python recipes/speech_detection.py --data speechocean762/ --sounds esc50/ --quantize nf4       # the real model
    python recipes/speech_detection.py --data speechocean762/ --model tiny --train all --learning-rate 1e-3 \\
        --epochs 10 --batch-size 16 --accumulation 1 --train-clips 1920 --test-clips 480           # offline, two cores
    python recipes/speech_detection.py --compare out-a/seed-0 out-b/seed-0                         # two runs
    python recipes/speech_detection.py --trained out/seed-0 --audio my.wav                         # a clip of one's own

Clips of 200-1,000 ms are cut from recordings, noise is added to both classes alike, and the model is asked which class
a clip is. What it answers on speakers and sources that training did not have stands beside one threshold on one number
of the spectrum: a model that does not beat that has learnt nothing.

Shapes: S samples, B clips of a batch, T tokens of a row, V vocabulary, F bins of a spectrum.
"""

import argparse
import csv
import hashlib
import importlib.metadata
import json
import logging
import math
import sys
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

# Messages that no user of this script can act on.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from scipy import signal
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)
from transformers.utils import logging as transformers_logging

# isort: split
import data
import metrics
import runtime
from support import cli, files

transformers_logging.set_verbosity_error()  # load_base checks for itself that no weight is missing
transformers_logging.disable_progress_bar()

HUB_MODEL = "Qwen/Qwen2-Audio-7B-Instruct"
TINY = "tiny"
# The task in the words of the system this follows.
SYSTEM = "You classify audio content."
QUESTION = """Choose one:
A) SPEECH (human voice)
B) NONSPEECH (music/noise/silence/animals)

Answer with A or B ONLY."""
LETTERS = {"SPEECH": "A", "NONSPEECH": "B"}
END = "<|im_end|>"
LANGUAGE_MODEL = r"language_model\.layers\.\d+\."  # names alone, such as q_proj, would match the audio encoder too
ATTENTION, MLP = LANGUAGE_MODEL + r"self_attn\.[qkvo]_proj", LANGUAGE_MODEL + r"mlp\.(gate|up|down)_proj"
LORA = ("rank", "alpha", "dropout", "mlp_targets", "audio_encoder")  # settings of an adapter
UNQUANTISED = ["model.audio_tower", "model.multi_modal_projector", "lm_head"]
AUDIO_ENCODER = r"audio_tower\.layers\.\d+\.self_attn\.[qkv]_proj"

DURATIONS = (200, 500, 1000)  # ms; 200 and 1,000 as there, 500 between
SNRS = (0, 5, 10, 20)  # dB, as there
PEAK = 0.9 * 10 ** (-3 / 20)  # of every clip, as there: a gain keeps the SNR, and no class is louder
MASKING = ("white", "pink")  # noise that is added to both classes alike; our choice
SHORTEST = DURATIONS[-1] * data.SAMPLE_RATE // 1000  # samples that a source must have
SPLITS = ("train", "test")

# ----------------------------------------------------------------------------------------------------------------------
# Settings


def parse_settings():
    """The command line as a namespace. Raises InputError when a value is wrong or two cannot work together."""
    parser = cli.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        usage="python recipes/speech_detection.py --data FOLDER [settings]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("clips").add_argument
    add("--data", type=Path, help="corpus folder in speechocean762's layout, or hub id: speech is cut from it")
    add("--sounds", type=Path, help="folder of sounds without speech, another kind of NONSPEECH")
    add(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="of NONSPEECH that are made; white alone is the task as it was published (the others: our choice)",
    )
    add("--train-clips", type=cli.positive_int, default=480, help="equally many of each class, duration and SNR (ours)")
    add("--test-clips", type=cli.positive_int, default=240, help="likewise, of other speakers and sources (ours)")
    add("--clip-seed", type=cli.seed, default=0, help="of sources, cuts and noise; --compare needs runs with one")

    add = parser.add_argument_group("model").add_argument
    add("--model", default=HUB_MODEL, help="checkpoint folder or hub id; tiny: a pocket-size one with random weights")
    add("--train", choices=("lora", "all"), default="lora", help="all: every weight, what random weights need")
    add("--rank", type=cli.positive_int, default=16, help="of LoRA (as published)")
    add("--alpha", type=cli.positive_int, default=32, help="of LoRA, scale alpha / rank (as published)")
    add("--dropout", type=cli.fraction, default=0.05, help="of LoRA's input (as published)")
    add("--mlp-targets", action="store_true", help="LoRA on the language model's MLP as well as its attention")
    add(
        "--audio-encoder",
        action="store_true",
        help="LoRA on the audio encoder's attention too: what target names without their path do unasked",
    )
    add("--quantize", choices=("nf4",), help="keep the language model's frozen layers in 4 bits (as published)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=cli.positive_int, default=3, help="passes over the clips (as published)")
    add("--batch-size", type=cli.positive_int, default=2, help="clips computed at once (as published)")
    add("--accumulation", type=cli.positive_int, default=8, help="batches in an update (as published)")
    add("--learning-rate", type=cli.positive_float, default=2e-4, help="peak (as published)")
    add(
        "--warmup",
        type=cli.fraction,
        default=0.1,
        help="share of the updates that are made (our choice: the "
        "published 100 updates were more than the whole run had)",
    )
    add("--clip", type=cli.positive_float, default=1.0, help="largest norm of an update's gradient (our choice)")
    add("--gradient-checkpointing", action="store_true", help="compute activations twice instead of keeping them")
    add(
        "--seeds",
        type=cli.seed,
        nargs="+",
        default=[0],
        help="of weights, order and dropout: a run for each (as published: 42 123 456 789 2024)",
    )
    add("--output", type=Path, default=Path("out-speech"), help="folder for clips, adapters and results")

    add = parser.add_argument_group("instead of a run").add_argument
    add("--compare", type=Path, nargs=2, metavar=("A", "B"), help="differences of two seed-N folders, with p-values")
    add("--trained", type=Path, metavar="RUN", help="seed-N folder to answer with, for --audio")
    add("--audio", type=Path, nargs="+", metavar="FILE", help="clips to be answered by --trained")
    settings, given = parser.parse_given()
    parser.refuse(conflicts(settings, given))
    return settings


def conflicts(settings, given):
    """What cannot work together, as (whether it is so, message). given: names of the settings that the user wrote."""
    cells = len(LETTERS) * len(DURATIONS) * len(SNRS)
    lora = settings.train == "lora"
    unused = " ".join(f"--{name.replace('_', '-')}" for name in LORA if name in given)
    instead = given & {"compare", "trained", "audio"}
    return [
        (
            instead and given not in ({"compare"}, {"trained", "audio"}),
            "--compare, and --trained with --audio, stand "
            f"alone: leave out the other settings, or {' '.join(f'--{name}' for name in sorted(instead))}",
        ),
        (not (settings.data or settings.compare or settings.trained), "give --data: a folder to cut speech from"),
        (not lora and settings.quantize, "--quantize nf4 freezes the weights that --train all would train"),
        (not lora and unused, f"--train all trains everything, without LoRA: leave out {unused}"),
        (
            len({*settings.seeds}) < len(settings.seeds),
            f"--seeds {' '.join(map(str, settings.seeds))}: each is one run, so none can stand twice",
        ),
        (
            lora and settings.model == TINY,
            f"--model {TINY} has random weights, and an adapter alone cannot teach it: add --train all",
        ),
        *(
            (
                clips % cells,
                f"{name} {clips} cannot be shared equally by {len(LETTERS)} classes x {len(DURATIONS)} "
                f"durations x {len(SNRS)} SNRs: use a multiple of {cells}",
            )
            for name, clips in (("--train-clips", settings.train_clips), ("--test-clips", settings.test_clips))
        ),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of NONSPEECH: number of samples and random numbers in, (S,) of any level out


def _coloured(slope, samples, rng):
    """Noise whose power falls with frequency to the power of `slope`: 0 white, 1 pink, 2 brown."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequency = np.maximum(np.fft.rfftfreq(samples, 1 / data.SAMPLE_RATE), 20)  # Hz; nothing is heard below
    return np.fft.irfft(spectrum * frequency ** (-slope / 2), samples)


def _partials(frequencies, samples, rng):
    time = np.arange(samples) / data.SAMPLE_RATE
    amplitudes, phases = rng.uniform(0.3, 1, len(frequencies)), rng.uniform(0, 2 * np.pi, len(frequencies))
    return sum(a * np.sin(2 * np.pi * f * time + p) for a, f, p in zip(amplitudes, frequencies, phases))


def _hum(samples, rng):
    """Of mains, 50 or 60 Hz, with its harmonics."""
    return _partials(rng.choice((50, 60)) * np.arange(1, rng.integers(4, 20)), samples, rng)


def _tone(samples, rng):
    return _partials([rng.uniform(80, 6000)], samples, rng)


def _chord(samples, rng):
    """Three notes, each with four harmonics, in the range of a voice."""
    notes = rng.uniform(80, 400) * np.array([1, rng.choice((1.2, 1.25)), 1.5])  # minor or major
    return _partials(np.outer(notes, np.arange(1, 5)).ravel(), samples, rng)


def _clicks(samples, rng):
    """Short bursts that ring for some milliseconds."""
    pulses = np.zeros(samples)
    pulses[rng.integers(0, samples, rng.integers(2, 12))] = rng.uniform(0.3, 1)
    ringing = np.arange(400) / data.SAMPLE_RATE
    decay = np.exp(-ringing / rng.uniform(0.001, 0.005)) * np.sin(2 * np.pi * rng.uniform(500, 5000) * ringing)
    return np.convolve(pulses, decay)[:samples]


def _silence(samples, rng):
    """What a microphone gives in a quiet room: rumble below 200 Hz and the hiss of its converter."""
    rumble = signal.sosfilt(signal.butter(2, 200, fs=data.SAMPLE_RATE, output="sos"), rng.standard_normal(samples))
    return rumble / rumble.std() + rng.uniform(0.2, 1) * rng.standard_normal(samples)


def _scrambled(speech, rng):
    """Noise with the spectrum of a stretch of speech (S,): the phases are drawn, so that nothing is articulated."""
    spectrum = np.abs(np.fft.rfft(speech))
    return np.fft.irfft(spectrum * np.exp(2j * np.pi * rng.uniform(size=len(spectrum))), len(speech))


DRAWN = {
    "white": partial(_coloured, 0),
    "pink": partial(_coloured, 1),
    "brown": partial(_coloured, 2),
    "hum": _hum,
    "tone": _tone,
    "chord": _chord,
    "clicks": _clicks,
    "silence": _silence,
}
KINDS = (*DRAWN, "scrambled")


# ----------------------------------------------------------------------------------------------------------------------
# Clips


@dataclass(frozen=True)
class Clip:
    id: str
    split: str
    label: str  # SPEECH or NONSPEECH
    kind: str  # speech, one of KINDS, or sound
    source: str  # recording it is made from, or the drawing of a synthetic sound
    group: str  # speaker, or source where there is none: what must not be in both splits
    duration: int  # ms
    snr: int  # dB
    masking: str  # the noise that was added
    sound: str  # digest of what it is made from, before cutting and noise


@dataclass(frozen=True)
class Source:
    name: str
    group: str
    read: callable  # () -> (S,)


def make_clips(settings):
    """Write output/clips/<split>/*.wav and output/clips.csv; returns the list of Clip.

    Raises InputError when there are too few sources, or a recording cannot be used, and RunError when a source, a
    speaker or a sound is in both splits.
    """
    rng = np.random.default_rng(settings.clip_seed)
    speech = split_sources(speech_sources(settings.data), settings, rng)
    sounds = split_sources(sound_sources(settings.sounds), settings, rng) if settings.sounds else None
    clips = []
    with files.whole(settings.output / "clips") as folder:
        for split, count in zip(SPLITS, (settings.train_clips, settings.test_clips)):
            (folder / split).mkdir(parents=True)
            speakers = iter(speech[split])
            others = iter(sounds[split]) if sounds else None
            for number in tqdm(range(count), desc=f"{split} clips", unit="clip", leave=False):
                clip, wave = one_clip(split, number, speakers, others, settings.kinds, rng)
                soundfile.write(folder / split / f"{clip.id}.wav", wave, data.SAMPLE_RATE, subtype="PCM_16")
                clips.append(clip)
        check_leaks(clips)
    with files.whole(settings.output / "clips.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Clip)])
        writer.writeheader()
        writer.writerows(map(asdict, clips))
    return clips


def speech_sources(corpus):
    """Utterances of both parts of the corpus that are long enough for the longest clip."""
    utterances = [u for split in SPLITS for u in data.read_corpus(corpus, split)]
    return [Source(u.id, u.speaker, partial(speech_of, u)) for u in utterances if u.samples >= SHORTEST]


def speech_of(utterance):
    """(S,). Raises InputError, naming the utterance, for a rate whose empty upper band would tell the class."""
    try:
        return data.read_audio(utterance.recording, data.SAMPLE_RATE)
    except cli.InputError as error:
        raise cli.InputError(f"{utterance.id}: {error}") from error


def sound_sources(folder):
    """Sounds of one's own; each file is a group of its own. Raises InputError naming every file that cannot be used."""
    sources, problems = [], []
    for path in data.sound_files(folder):
        try:
            if len(data.read_sound_file(path, lowest_rate=data.SAMPLE_RATE)) < SHORTEST:
                raise cli.InputError(f"{path}: shorter than the longest clip, {DURATIONS[-1]:,} ms")
            name = str(path.relative_to(folder))
            sources.append(Source(name, name, partial(data.read_sound_file, path)))
        except cli.InputError as error:
            problems.append(str(error))
    if problems:
        raise cli.InputError(
            f"{len(problems)} files of {folder} cannot be used; repair or remove them:\n  " + "\n  ".join(problems)
        )
    return sources


def split_sources(sources, settings, rng):
    """{split: its sources in random order}. No group is in both; the test part gets its share of the clips."""
    groups = sorted({source.group for source in sources})
    if len(groups) < len(SPLITS):
        raise cli.InputError(
            f"sources of {len(groups)} speakers or files of at least {DURATIONS[-1]:,} ms: two are "
            f"needed, one to train on and another to test on"
        )
    held_out = max(1, round(len(groups) * settings.test_clips / (settings.train_clips + settings.test_clips)))
    test = set(rng.permutation(groups)[:held_out])
    order = rng.permutation(len(sources))
    return {split: [sources[i] for i in order if (sources[i].group in test) == (split == "test")] for split in SPLITS}


def one_clip(split, number, speakers, others, kinds, rng):
    """The clip of this number and its wave (S,). Classes, durations, SNRs and kinds take turns, so all are as frequent.

    A speech recording is used once; where a made-up kind needs one (scrambled), it is of a speaker of the same split.
    """
    turn, label = divmod(number, len(LETTERS))
    turn, duration = divmod(turn, len(DURATIONS))
    turn, snr = divmod(turn, len(SNRS))
    # Kinds begin elsewhere in each combination and each time, so that none is tied to a duration or an SNR.
    turn = turn * (len(DURATIONS) * len(SNRS) + 1) + duration * len(SNRS) + snr
    label, duration, snr = list(LETTERS)[label], DURATIONS[duration], SNRS[snr]
    kinds = ["speech"] if label == "SPEECH" else [*kinds, *(["sound"] if others else [])]
    kind = kinds[turn % len(kinds)]
    masking = str(rng.choice(MASKING))
    samples = duration * data.SAMPLE_RATE // 1000
    if kind in DRAWN:
        source = Source(f"{kind}-{split}-{number}", f"{kind}-{split}-{number}", None)
        sound = wave = DRAWN[kind](samples, rng)
    else:
        source = next_source(others if kind == "sound" else speakers, kind, split)
        sound = source.read()
        wave = loudest(sound, samples)
        wave = _scrambled(wave, rng) if kind == "scrambled" else wave
    digest = hashlib.sha256(sound.tobytes()).hexdigest()[:16]
    clip = Clip(f"{split}-{number:05d}", split, label, kind, source.name, source.group, duration, snr, masking, digest)
    return clip, normalise(add_noise(wave, DRAWN[masking](samples, rng), snr), source.name)


def next_source(sources, kind, split):
    source = next(sources, None)
    if source is None:
        raise cli.InputError(
            f"too few recordings of at least {DURATIONS[-1]:,} ms for the {split} clips of kind "
            f"{kind}: each is used once; lower --train-clips and --test-clips"
        )
    return source


def loudest(audio, samples):
    """The stretch (samples,) with the most energy: a clip cut anywhere might hold a pause."""
    energy = np.concatenate([[0], np.cumsum(np.square(audio, dtype=np.float64))])
    start = int(np.argmax(energy[samples:] - energy[:-samples]))
    return audio[start : start + samples]


def add_noise(wave, noise, snr):
    """wave + noise at an SNR in dB, both (S,), by their root mean squares."""
    level = np.sqrt(np.mean(np.square(wave, dtype=np.float64)) / np.mean(np.square(noise)))
    return wave + noise * level / 10 ** (snr / 20)


def normalise(wave, name):
    """The wave with its peak at PEAK, float32. Raises InputError for digital silence."""
    peak = np.abs(wave).max()
    if peak < 1e-6:
        raise cli.InputError(f"{name} is digital silence where it is loudest: leave it out")
    return (wave * PEAK / peak).astype(np.float32)


def check_leaks(clips):
    """Raises RunError when train and test share a source, a speaker or a sound: the test would measure memory."""
    for what in ("source", "group", "sound"):
        seen = {split: {getattr(clip, what): clip.id for clip in clips if clip.split == split} for split in SPLITS}
        if shared := sorted(seen["train"].keys() & seen["test"].keys()):
            named = {clip.id: f"{clip.id} ({clip.source})" for clip in clips}
            pairs = ", ".join(f"{named[seen['train'][key]]} and {named[seen['test'][key]]}" for key in shared[:3])
            raise cli.RunError(
                f"train and test clips share a {what}, {len(shared)} times: {pairs}; the test would measure memory"
            )


def wave_of(clip, output):
    return data.read_sound_file(output / "clips" / clip.split / f"{clip.id}.wav")


# ----------------------------------------------------------------------------------------------------------------------
# Model


def load_processor(name):
    """Tokenizer and feature extractor of a checkpoint. Raises InputError when they cannot be loaded."""
    try:
        processor = Qwen2AudioProcessor.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise cli.InputError(
            f"--model {name} is no Qwen2-Audio checkpoint that can be loaded: {cli.first_line(error)}"
        ) from error
    # Generating continues the last column: with padding on the right it would continue padding.
    processor.tokenizer.padding_side = "left"
    return processor


def load_base(name, train, quantize=None):
    """(network, processor). Frozen weights are bfloat16 on CUDA; those that train, and all on a CPU, are float32.

    name: folder or hub id; train: "lora" or "all"; quantize: None, or "nf4" for the language model's layers. Weights
    are read from safetensors alone. Raises InputError when the checkpoint cannot be loaded.
    """
    processor, cuda = load_processor(name), torch.cuda.is_available()
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if cuda else torch.float32,
        llm_int8_skip_modules=UNQUANTISED,
    )
    try:
        network, loaded = Qwen2AudioForConditionalGeneration.from_pretrained(
            name,
            dtype=torch.bfloat16 if cuda and train == "lora" else torch.float32,
            quantization_config=nf4 if quantize else None,
            use_safetensors=True,
            output_loading_info=True,
        )
        if wrong := sorted(loaded["missing_keys"]) + sorted(map(str, loaded["mismatched_keys"])):
            raise ValueError(f"{len(wrong)} weights are missing or have another shape, such as {wrong[0]}")
    except (OSError, ValueError) as error:
        raise cli.InputError(f"--model {name} cannot be loaded: {cli.first_line(error)}") from error
    return network.to("cuda") if cuda and not quantize else network, processor


def lora_targets(mlp_targets, audio_encoder):
    """A regular expression over full names of modules."""
    return ".*(" + "|".join([ATTENTION] + [MLP] * mlp_targets + [AUDIO_ENCODER] * audio_encoder) + ")"


def add_lora(network, settings):
    """The network with a fresh adapter, in float32, its base frozen."""
    targets = lora_targets(settings.mlp_targets, settings.audio_encoder)
    return get_peft_model(
        network,
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=targets,
            lora_dropout=settings.dropout,
            task_type="CAUSAL_LM",
        ),
    )


def trained(network):
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def new_model(settings, seed):
    """(network, processor) with what is to be trained."""
    torch.manual_seed(seed)
    name = settings.model
    if name == TINY:
        name = settings.output / f"seed-{seed}" / "base"
        write_tiny(name)
    network, processor = load_base(name, settings.train, settings.quantize)
    if settings.train == "lora":
        network = add_lora(network, settings)
    if settings.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return network, processor


def save_trained(network, processor, folder, settings):
    """The adapter in PEFT's format, or the whole checkpoint; with settings.json."""
    with files.whole(folder / "final") as temporary:
        network.save_pretrained(temporary, **({"save_embedding_layers": False} if settings.train == "lora" else {}))
        if settings.train == "all":
            processor.save_pretrained(temporary)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()}
    with files.whole(folder / "settings.json") as temporary:
        temporary.write_text(json.dumps(values | {"versions": versions}, indent=2) + "\n")


def load_trained(folder):
    """(network, processor) of a seed-N folder. Raises InputError when it holds no finished run."""
    path = folder / "settings.json"
    if not path.is_file():
        raise cli.InputError(f"{folder} is no finished run ({path} is missing): give a seed-N folder")
    settings = argparse.Namespace(**json.loads(path.read_text()))
    if settings.train == "all":
        return load_base(folder / "final", settings.train)
    network, processor = load_base(settings.model, settings.train, settings.quantize)
    return PeftModel.from_pretrained(network, folder / "final"), processor


def write_tiny(folder):
    """A checkpoint of the real classes with 0.24 million random weights, for clips of up to a second.

    The deviation of these is our choice: with the classes' own 0.02 the signal fades in so narrow a model.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", END, "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([SYSTEM, QUESTION, "system\nuser\nassistant\nAudio 1: "] * 10, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=END)
    # The real extractor pads to 30 s. A second is enough for these clips, and thirty times less work.
    extractor = WhisperFeatureExtractor(feature_size=128, chunk_length=1)
    config = Qwen2AudioConfig(
        audio_config={
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "num_mel_bins": 128,
            "max_source_positions": extractor.nb_max_frames // 2,
            "initializer_range": 0.08,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
            "initializer_range": 0.08,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)
    Qwen2AudioProcessor(extractor, tokenizer).save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# What the model reads


def prompt_text(processor):
    """The prompt up to where the answer begins; the same in training and in evaluation."""
    audio_and_question = [{"type": "audio", "audio_url": "clip.wav"}, {"type": "text", "text": QUESTION}]
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": audio_and_question}]
    return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def read_clips(processor, waves, answers=None):
    """Tensors of a batch, padded on the left, on the model's side of `processor`.

    waves: list of (S,) at 16 kHz; answers: letters, to train on. Returns input_ids and attention_mask (B, T),
    input_features (B, mel bins, frames) and feature_attention_mask (B, frames).
    """
    prompt = prompt_text(processor)
    texts = [prompt + answer + END for answer in answers] if answers else [prompt] * len(waves)
    # `audios=`, the keyword of older examples, was once ignored without a word; a rate that is not given likewise.
    return processor(text=texts, audio=waves, sampling_rate=data.SAMPLE_RATE, padding=True, return_tensors="pt")


def mask_labels(batch, processor, answers):
    """(B, T): the answer's tokens, the letter and <|im_end|>, and IGNORE on all before them."""
    labels = torch.full_like(batch["input_ids"], data.IGNORE)
    for row, answer in enumerate(answers):
        ids = processor.tokenizer.encode(answer + END, add_special_tokens=False)
        if batch["input_ids"][row, -len(ids) :].tolist() != ids:
            raise cli.InputError(f"this checkpoint's tokenizer joins the answer {answer!r} with what stands before it")
        labels[row, -len(ids) :] = torch.tensor(ids)
    return labels


def letter_ids(tokenizer):
    """{label: ids of the single tokens that write its letter}: plain, after a space, after a newline."""
    variants = {
        label: [tokenizer.encode(before + letter, add_special_tokens=False) for before in ("", " ", "\n")]
        for label, letter in LETTERS.items()
    }
    return {label: sorted({ids[0] for ids in found if len(ids) == 1}) for label, found in variants.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Training


def answer_loss(network, processor, waves, answers):
    """Summed cross-entropy of the answers' tokens."""
    batch = read_clips(processor, waves, answers).to(network.device)
    labels = mask_labels(batch, processor, answers)
    with runtime.autocast():
        logits = network(**batch).logits  # (B, T, V)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def train(network, processor, clips, settings, seed, log):
    """Train on the clips of the train split. A step is --batch-size x --accumulation clips, its gradient their mean."""
    step_size = min(settings.batch_size * settings.accumulation, len(clips))
    per_epoch = len(clips) // step_size
    steps, weights = per_epoch * settings.epochs, trained(network)
    warmup = math.ceil(settings.warmup * steps)
    optimiser = torch.optim.AdamW(weights, weight_decay=0.0, fused=True)
    waves = {clip.id: wave_of(clip, settings.output) for clip in clips}
    network.train()
    with tqdm(total=steps, unit="step", desc=f"seed {seed}", leave=False) as bar:
        for epoch in range(1, settings.epochs + 1):
            for indices in data.epoch_steps(len(clips), step_size, seed, epoch):
                chosen = [clips[i] for i in indices]
                rate = runtime.learning_rate(bar.n, steps, settings.learning_rate, warmup)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                loss = 0.0
                for start in range(0, step_size, settings.batch_size):
                    part = chosen[start : start + settings.batch_size]
                    answers = [LETTERS[clip.label] for clip in part]
                    summed = answer_loss(network, processor, [waves[clip.id] for clip in part], answers) / step_size
                    summed.backward()
                    loss += float(summed.detach())
                norm = runtime.update(optimiser, weights, loss, settings.clip, partial(not_finite, bar.n + 1, chosen))
                bar.update()
                line = {"step": bar.n, "epoch": epoch, "learning_rate": rate, "loss": loss, "gradient_norm": norm}
                print(json.dumps(line), file=log, flush=True)
                bar.set_postfix_str(f"loss {loss:.4f}")


def not_finite(step, clips, loss, norm):
    return cli.RunError(
        f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}; the step was not applied. It comes "
        f"from one of: {', '.join(clip.id for clip in clips)}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.inference_mode()
def classify(network, processor, waves, batch_size):
    """Probability of SPEECH for each wave: one greedy token that can only be A or B, in any way of writing it."""
    network.eval()
    ids = letter_ids(processor.tokenizer)
    allowed = sorted(sum(ids.values(), []))
    speech = torch.tensor([token in ids["SPEECH"] for token in allowed])
    probabilities = []
    for start in range(0, len(waves), batch_size):
        batch = read_clips(processor, waves[start : start + batch_size]).to(network.device)
        with runtime.autocast():
            answer = network.generate(
                **batch,
                max_new_tokens=1,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
                prefix_allowed_tokens_fn=lambda row, written: allowed,
            )
        logits = answer.logits[0][:, allowed].float().cpu()  # (B, allowed)
        probabilities += logits.softmax(-1)[:, speech].sum(-1).tolist()
    return probabilities


def flatness(wave):
    """Mean over frames of the spectrum's geometric mean by its arithmetic mean: 0.56 for white noise, 0 for a tone."""
    _, _, power = signal.spectrogram(wave, data.SAMPLE_RATE, nperseg=512, noverlap=256)  # (F, frames)
    power = power + 1e-12  # 16-bit silence
    return float(np.mean(np.exp(np.log(power).mean(axis=0)) / power.mean(axis=0)))


def flatness_baseline(train_clips, test_clips, output):
    """Whether SPEECH, for each test clip: one threshold on flatness, the best one on the train clips."""
    values = np.array([flatness(wave_of(clip, output)) for clip in train_clips])
    speech = np.array([clip.label == "SPEECH" for clip in train_clips])
    order = np.sort(values)
    found = [
        (np.mean((values < t) == (speech == below)), t, below)
        for t in (order[1:] + order[:-1]) / 2
        for below in (True, False)
    ]
    _, threshold, below = max(found)
    return [bool((flatness(wave_of(clip, output)) < threshold) == below) for clip in test_clips]


def write_predictions(path, clips, probabilities, baseline):
    with files.whole(path) as temporary:
        lines = [
            asdict(clip)
            | {
                "speech": p,
                "correct": (p > 0.5) == (clip.label == "SPEECH"),
                "flatness_correct": by_flatness == (clip.label == "SPEECH"),
            }
            for clip, p, by_flatness in zip(clips, probabilities, baseline, strict=True)
        ]
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def accuracy(lines, key="correct"):
    """Accuracy with Wilson's interval, and one that takes clips of a speaker as dependent: bootstrap over groups."""
    right = np.array([line[key] for line in lines], dtype=np.float64)
    groups = [line["group"] for line in lines]
    sums = metrics.resampled_sums({"right": right, "all": np.ones(len(right))}, groups, set(groups))
    return {
        "accuracy": right.mean(),
        "clips": len(lines),
        "wilson": metrics.share_interval(int(right.sum()), len(lines)),
        "bootstrap": metrics.interval(sums["right"] / sums["all"]),
    }


def show_results(runs):
    """Print and return what the runs of all seeds got right. runs: {seed: lines of its predictions}."""
    any_run = next(iter(runs.values()))  # clips and baseline are the same in all
    results = {"flatness threshold": accuracy(any_run, "flatness_correct")}
    for seed, lines in runs.items():
        outcomes = ([line[key] for line in lines] for key in ("correct", "flatness_correct"))
        alone = dict(zip(("alone_right", "flatness_alone_right", "mcnemar_pvalue"), metrics.mcnemar(*outcomes)))
        results[f"model, seed {seed}"] = accuracy(lines) | alone
    print(
        f"\n{len(any_run)} test clips of {len({line['group'] for line in any_run})} speakers and sources\n\n"
        f"{'':24}accuracy   Wilson 95 %   over speakers 95 %   McNemar against flatness"
    )
    for name, of in results.items():
        beside = (
            f"alone right {of['alone_right']} : {of['flatness_alone_right']}, p = {of['mcnemar_pvalue']:.2g}"
            if "alone_right" in of
            else ""
        )
        print(
            f"{name:24}{of['accuracy']:.3f}      {_range(of['wilson'])}   {_range(of['bootstrap'])}          {beside}"
        )
    values = [of["accuracy"] for name, of in results.items() if name.startswith("model")]
    print(f"{'model, all seeds':24}{np.mean(values):.3f}      {min(values):.3f}-{max(values):.3f}")
    return results | {"parts": show_parts(runs)}


def show_parts(runs):
    """Print and return accuracy by class, duration, SNR and kind: mean of the seeds, with Wilson's interval of one."""
    lines = [line for run in runs.values() for line in run]
    parts = {}
    for key in ("label", "duration", "snr", "kind"):
        print()
        for value in sorted({line[key] for line in lines}, key=lambda v: (isinstance(v, str), v)):
            chosen = [line for line in lines if line[key] == value]
            clips, name = len(chosen) // len(runs), f"{key} {value}"
            share, by_flatness = (np.mean([line[of] for line in chosen]) for of in ("correct", "flatness_correct"))
            wilson = metrics.share_interval(round(share * clips), clips)
            parts[name] = {"accuracy": share, "wilson": wilson, "flatness": by_flatness, "clips": clips}
            print(f"{name:24}{share:.3f}      {_range(wilson)}   flatness {by_flatness:.3f}   {clips} clips")
    return parts


def _range(interval):
    return f"{interval[0]:.3f}-{interval[1]:.3f}"


# ----------------------------------------------------------------------------------------------------------------------
# Instead of a run


def compare(first, second):
    """Print the difference of two runs on the same clips: exact McNemar, and a paired bootstrap over groups."""
    runs = []
    for folder in (first, second):
        path = folder / "predictions.jsonl"
        if not path.is_file():
            raise cli.InputError(f"--compare: {path} is missing; give two seed-N folders of finished runs")
        runs.append({line["id"]: line for line in map(json.loads, path.read_text().splitlines())})
    ids = list(runs[0])
    described = [[[run[id][field.name] for field in fields(Clip)] for id in ids if id in run] for run in runs]
    if ids != list(runs[1]) or described[0] != described[1]:
        raise cli.InputError(
            f"--compare: {first} and {second} were tested on other clips; use the same --data, --kinds and --clip-seed"
        )
    right = [np.array([run[id]["correct"] for id in ids], dtype=np.float64) for run in runs]
    groups = [runs[0][id]["group"] for id in ids]
    sums = metrics.resampled_sums({"gain": right[0] - right[1], "all": np.ones(len(ids))}, groups, set(groups))
    difference = sums["gain"] / sums["all"]
    alone = metrics.mcnemar(*right)
    for name, folder, values in zip("AB", (first, second), right):
        print(f"{name}  {values.mean():.3f}  {folder}")
    low, high = metrics.interval(difference)
    print(
        f"A - B  {(right[0] - right[1]).mean():+.3f}, 95 % {low:+.3f} to {high:+.3f}, p = "
        f"{metrics.sign_pvalue(difference):.2g} (paired bootstrap over speakers and sources)"
    )
    print(f"A alone is right {alone[0]} times, B alone {alone[1]} times: McNemar's exact test, p = {alone[2]:.2g}")


def answer(run, paths):
    """Print the answer to each file, and how sure it is. Raises InputError for what no clip of a run is like."""
    waves = []
    for path in paths:
        wave = data.read_sound_file(path, lowest_rate=data.SAMPLE_RATE)
        milliseconds = len(wave) * 1000 // data.SAMPLE_RATE
        if not DURATIONS[0] <= milliseconds <= DURATIONS[-1]:
            raise cli.InputError(
                f"{path}: {milliseconds:,} ms; models are trained on clips of {DURATIONS[0]} to "
                f"{DURATIONS[-1]:,} ms: cut one out"
            )
        waves.append(normalise(wave, path))
    network, processor = load_trained(run)
    for path, speech in zip(paths, classify(network, processor, waves, batch_size=1)):
        print(f"{path}  {'SPEECH' if speech > 0.5 else 'NONSPEECH'}  {max(speech, 1 - speech):.3f}")


# ----------------------------------------------------------------------------------------------------------------------
# A run


def run(settings):
    """Clips, then a model for each seed, then the table."""
    if (settings.output / "clips.csv").exists():
        raise cli.InputError(f"{settings.output} holds a run already: choose another --output, or remove it")
    files.make_folder(settings.output, "--output")
    if settings.model != TINY:
        load_processor(settings.model)  # a wrong name is said before clips are made
    clips = make_clips(settings)
    parts = {split: [clip for clip in clips if clip.split == split] for split in SPLITS}
    kinds = Counter(clip.kind for clip in clips)
    print(
        f"clips: {len(parts['train'])} to train on, {len(parts['test'])} to test on; "
        + ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    )
    baseline = flatness_baseline(parts["train"], parts["test"], settings.output)
    runs = {}
    for seed in settings.seeds:
        folder = settings.output / f"seed-{seed}"
        folder.mkdir()
        network, processor = new_model(settings, seed)
        print(
            f"seed {seed}: {sum(p.numel() for p in trained(network)):,} of "
            f"{sum(p.numel() for p in network.parameters()):,} parameters are trained"
        )
        with open(folder / "log.jsonl", "w") as log:
            train(network, processor, parts["train"], settings, seed, log)
        save_trained(network, processor, folder, settings)
        waves = [wave_of(clip, settings.output) for clip in parts["test"]]
        probabilities = classify(network, processor, waves, settings.batch_size)
        runs[seed] = write_predictions(folder / "predictions.jsonl", parts["test"], probabilities, baseline)
    results = show_results(runs)
    with files.whole(settings.output / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\npeak memory {runtime.peak_memory():.1f} GB; adapters, predictions and clips in {settings.output}/")


def main():
    settings = parse_settings()
    if settings.compare:
        compare(*settings.compare)
    elif settings.trained:
        answer(settings.trained, settings.audio)
    else:
        run(settings)


if __name__ == "__main__":
    cli.run_script("speech_detection.py", main)
