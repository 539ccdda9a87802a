"""Is there human speech in this clip? Qwen2-Audio with LoRA answers A (SPEECH) or B (NONSPEECH).

    python -m recipes.speech_detection --data speechocean762/ --sounds esc50/ --quantize nf4       # the real model
    python -m recipes.speech_detection --data speechocean762/ --model tiny --train all --learning-rate 1e-3 \\
        --epochs 10 --batch-size 16 --accumulation 1 --train-clips 1920 --test-clips 480           # offline, two cores
    python -m recipes.speech_detection --compare out-a/seed-0 out-b/seed-0                         # two runs
    python -m recipes.speech_detection --trained out-speech/seed-0 --audio my.wav                  # a clip of one's own

Clips of 200-1,000 ms are cut from recordings, noise is added to both classes alike, and the model is asked which class
a clip is. What it answers on speakers and sources that training did not have stands beside one threshold on one number
of the spectrum: a model that does not beat that has learnt nothing.

Shapes: S samples, B clips of a batch, T tokens of a row, V vocabulary, F bins of a spectrum.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
import hashlib
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
from pydantic import Field
from scipy import signal
import soundfile
import tokenizers
import torch
import torch.nn.functional as F
import transformers

import data
import metrics
from recipes import common
from support import cli, files, pretrained, sound
from support.files import write_json
from support.later import when_used

with when_used():  # it prints a line when it is imported
    import peft

COMMAND = "recipes.speech_detection"
TINY = "tiny"
Kind = Literal["white", "pink", "brown", "hum", "tone", "chord", "clicks", "silence", "scrambled"]


@dataclass
class Settings:
    """A source in brackets: as published by the first authors, or our choice."""

    data: Path | None = None  # corpus folder in speechocean762's layout, or hub id: speech is cut from it
    data_reader: Path | None = None  # Python file that reads another layout: docs/own-data.md
    sounds: Path | None = None  # folder of sounds without speech, another kind of NONSPEECH
    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] = get_args(Kind)  # of NONSPEECH (published: white alone)
    train_clips: cli.Count = 480  # equally many of each class, duration and SNR (our choice)
    test_clips: cli.Count = 240  # likewise, of other speakers and sources (our choice)
    clip_seed: cli.Seed = 0  # of sources, cuts and noise; --compare needs runs with one

    model: str = "Qwen/Qwen2-Audio-7B-Instruct"  # folder or hub id; tiny: a pocket-size one with random weights
    train: Literal["lora", "all"] = "lora"  # all: every weight, what random weights need
    rank: cli.Count = 16  # of LoRA (as published)
    alpha: cli.Count = 32  # of LoRA, scale alpha / rank (as published)
    dropout: cli.Fraction = 0.05  # of LoRA's input (as published)
    mlp_targets: bool = False  # LoRA on the language model's MLP as well as its attention
    audio_encoder: bool = False  # LoRA on the audio encoder's attention too, as names without their path do unasked
    quantize: Literal["nf4"] | None = None  # keep the language model's frozen layers in 4 bits (as published)

    epochs: cli.Count = 3  # passes over the clips (as published)
    batch_size: cli.Count = 2  # clips computed at once (as published)
    accumulation: cli.Count = 8  # batches in an update (as published)
    learning_rate: cli.Positive = 2e-4  # peak (as published)
    warmup: cli.Fraction = 0.1  # share of the updates (our choice: the published 100 were more than the whole run had)
    clip: cli.Positive = 1.0  # largest norm of an update's gradient (our choice)
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them
    seeds: Annotated[tuple[cli.Seed, ...], Field(min_length=1)] = (0,)  # of weights, order, dropout: a run for each
    output: Path = Path("out-speech")  # folder for clips, adapters and results

    compare: tuple[Path, Path] | None = None  # instead of a run: differences of two seed-N folders, with p-values
    trained: Path | None = None  # instead of a run: seed-N folder to answer with, for --audio
    audio: tuple[Path, ...] = ()  # clips to be answered by --trained


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
UNQUANTISED = ["model.audio_tower", "model.multi_modal_projector", "lm_head"]
AUDIO_ENCODER = r"audio_tower\.layers\.\d+\.self_attn\.[qkv]_proj"

DURATIONS = (200, 500, 1000)  # ms; 200 and 1,000 as there, 500 between
SNRS = (0, 5, 10, 20)  # dB, as there
PEAK = 0.9 * 10 ** (-3 / 20)  # of every clip, as there: a gain keeps the SNR, and no class is louder
MASKING = ("white", "pink")  # noise that is added to both classes alike; our choice
CELLS = [*product(SNRS, DURATIONS, LETTERS)]  # clips take turns, so all are as frequent
SHORTEST = DURATIONS[-1] * data.SAMPLE_RATE // 1000  # samples that a source must have
SPLITS = ("train", "test")


def check(settings):
    """Raises InputError for settings that cannot work together."""
    if settings.compare:
        common.refuse_unused(settings, "compare")
    elif settings.trained:
        common.refuse_unused(settings, "trained", "audio")
        if not settings.audio:
            raise cli.InputError("--trained answers clips: name them with --audio")
    elif not settings.data:
        raise cli.InputError("give --data: a folder to cut speech from")
    if settings.train == "all" and settings.quantize:
        raise cli.InputError("--quantize nf4 freezes the weights that --train all would train")
    if settings.train == "lora" and settings.model == TINY:
        raise cli.InputError("--model tiny has random weights, and an adapter alone cannot teach it: add --train all")
    for name in ("train_clips", "test_clips"):
        if (clips := getattr(settings, name)) % len(CELLS):
            raise cli.InputError(
                f"{cli.flag(name)} {clips} cannot be shared equally by {len(LETTERS)} classes x {len(DURATIONS)} "
                f"durations x {len(SNRS)} SNRs: use a multiple of {len(CELLS)}"
            )


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


def _notes(rng):
    return rng.uniform(80, 400) * np.array([1, rng.choice((1.2, 1.25)), 1.5])  # minor or major, as deep as a voice


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
    "hum": lambda n, rng: _partials(rng.choice((50, 60)) * np.arange(1, rng.integers(4, 20)), n, rng),  # of mains, Hz
    "tone": lambda n, rng: _partials([rng.uniform(80, 6000)], n, rng),
    "chord": lambda n, rng: _partials(np.outer(_notes(rng), np.arange(1, 5)).ravel(), n, rng),  # 4 harmonics of each
    "clicks": _clicks,
    "silence": _silence,
}


# ----------------------------------------------------------------------------------------------------------------------
# Clips


class Clip(files.Shape):
    id: str
    split: str
    label: str  # SPEECH or NONSPEECH
    kind: str  # speech, one of --kinds, or sound
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
    recording: Callable[[], bytes]

    def read(self):
        """(S,). Of a lower rate the empty upper band would tell the class."""
        return sound.read_audio(self.recording, lowest_rate=data.SAMPLE_RATE)


def make_clips(settings):
    """Write output/clips/<split>/*.wav and output/clips.jsonl; returns the list of Clip.

    Raises InputError when there are too few sources, or a recording cannot be used, and RunError when a source, a
    speaker or a sound is in both splits.
    """
    rng = np.random.default_rng(settings.clip_seed)
    folder, _ = data.find_corpus(settings.data, None)
    utterances = [u for split in SPLITS for u in data.read_corpus(folder, split, reader=settings.data_reader)]
    utterances = [utterance for utterance in utterances if utterance.samples >= SHORTEST]
    speech = split_sources([Source(u.id, u.speaker, u.recording) for u in utterances], settings, rng)
    sounds = None
    if settings.sounds:  # each file is a group of its own
        names = {str(path.relative_to(settings.sounds)): path for path in sound.sound_files(settings.sounds)}
        own = [Source(name, name, partial(files.read_bytes, path)) for name, path in names.items()]
        sounds = split_sources(own, settings, rng)
    clips = []
    with files.whole(settings.output / "clips") as folder:
        for split, count in zip(SPLITS, (settings.train_clips, settings.test_clips)):
            (folder / split).mkdir(parents=True)
            speakers = iter(speech[split])
            others = iter(sounds[split]) if sounds else None
            for number in cli.Progress(range(count), desc=f"{split} clips", unit="clip"):
                clip, wave = one_clip(split, number, speakers, others, settings.kinds, rng)
                soundfile.write(folder / split / f"{clip.id}.wav", wave, data.SAMPLE_RATE, subtype="PCM_16")
                clips.append(clip)
        check_leaks(clips)
    common.write_lines(settings.output / "clips.jsonl", [clip.model_dump() for clip in clips])
    return clips


def split_sources(sources, settings, rng):
    """{split: its sources in random order}. No group is in both; the test part gets its share of the clips.

    Raises InputError naming every source that cannot be used.
    """

    def check(source):
        if len(source.read()) < SHORTEST:
            raise cli.InputError(f"shorter than the longest clip, {DURATIONS[-1]:,} ms")

    common.every([(source.name, source) for source in sources], check, "recordings")
    groups = sorted({source.group for source in sources})
    if len(groups) < len(SPLITS):
        raise cli.InputError(f"{len(groups)} speakers or files of at least {DURATIONS[-1]:,} ms: two are needed")
    held_out = max(1, round(len(groups) * settings.test_clips / (settings.train_clips + settings.test_clips)))
    test = set(rng.permutation(groups)[:held_out])
    order = rng.permutation(len(sources))
    return {split: [sources[i] for i in order if (sources[i].group in test) == (split == "test")] for split in SPLITS}


def one_clip(split, number, speakers, others, kinds, rng):
    """The clip of this number and its wave (S,). Classes, durations, SNRs and kinds take turns, so all are as frequent.

    A speech recording is used once; where a made-up kind needs one (scrambled), it is of a speaker of the same split.
    """
    turn, cell = divmod(number, len(CELLS))
    snr, duration, label = CELLS[cell]
    # Kinds begin elsewhere in each combination and each time, so that none is tied to a duration or an SNR.
    turn = turn * (len(DURATIONS) * len(SNRS) + 1) + DURATIONS.index(duration) * len(SNRS) + SNRS.index(snr)
    kinds = ["speech"] if label == "SPEECH" else [*kinds, *(["sound"] if others else [])]
    kind = kinds[turn % len(kinds)]
    masking = str(rng.choice(MASKING))
    samples = duration * data.SAMPLE_RATE // 1000
    if kind in DRAWN:
        source = Source(f"{kind}-{split}-{number}", f"{kind}-{split}-{number}", bytes)
        original = wave = DRAWN[kind](samples, rng)
    else:
        source = next(others if kind == "sound" else speakers, None)
        if source is None:
            raise cli.InputError(
                f"too few recordings of at least {DURATIONS[-1]:,} ms for the {split} clips of kind {kind}: each is "
                f"used once; lower --train-clips and --test-clips"
            )
        original = source.read()
        wave = loudest(original, samples)
        wave = _scrambled(wave, rng) if kind == "scrambled" else wave
    digest = hashlib.sha256(original.tobytes()).hexdigest()[:16]
    about = {"id": f"{split}-{number:05d}", "split": split, "label": label, "kind": kind, "source": source.name}
    about |= {"group": source.group, "duration": duration, "snr": snr, "masking": masking, "sound": digest}
    return Clip(**about), normalise(add_noise(wave, DRAWN[masking](samples, rng), snr), source.name)


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
        seen = {split: {getattr(clip, what): clip for clip in clips if clip.split == split} for split in SPLITS}
        if shared := sorted(seen["train"].keys() & seen["test"].keys()):
            both = ([seen[split][key] for split in SPLITS] for key in shared[:3])
            pairs = ", ".join(" and ".join(f"{clip.id} ({clip.source})" for clip in pair) for pair in both)
            raise cli.RunError(
                f"train and test clips share a {what}, {len(shared)} times: {pairs}; the test would measure memory"
            )


def wave_of(clip, output):
    """(S,) float32."""
    return soundfile.read(output / "clips" / clip.split / f"{clip.id}.wav", dtype="float32")[0]


# ----------------------------------------------------------------------------------------------------------------------
# Model


def load_base(name, train, quantize=None):
    """(network, processor). Frozen weights are bfloat16 on CUDA; those that train, and all on a CPU, are float32.

    name: folder or hub id; train: "lora" or "all"; quantize: None, or "nf4" for the language model's layers. Raises
    InputError when the checkpoint cannot be loaded.
    """
    classes = transformers.Qwen2AudioForConditionalGeneration, transformers.Qwen2AudioProcessor
    dtype = torch.bfloat16 if common.DEVICE == "cuda" and train == "lora" else torch.float32
    network, processor = common.load(*classes, name, dtype, bool(quantize), UNQUANTISED)
    common.check_ids(processor.tokenizer.get_vocab().values(), network.get_input_embeddings().num_embeddings, name)
    # Generating continues the last column: with padding on the right it would continue padding.
    processor.tokenizer.padding_side = "left"
    return network, processor


def lora_targets(mlp_targets, audio_encoder):
    """A regular expression over full names of modules."""
    return ".*(" + "|".join([ATTENTION] + [MLP] * mlp_targets + [AUDIO_ENCODER] * audio_encoder) + ")"


def new_model(settings, seed):
    """(network, processor) with what is to be trained."""
    torch.manual_seed(seed)
    name = settings.model
    if name == TINY:
        name = settings.output / f"seed-{seed}" / "base"
        write_tiny(name)
    network, processor = load_base(name, settings.train, settings.quantize)
    if settings.train == "lora":
        targets = lora_targets(settings.mlp_targets, settings.audio_encoder)
        network = common.add_lora(network, settings, targets, task_type="CAUSAL_LM")
    if settings.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return network, processor


class Trained(files.Shape):
    """What of a run's settings is read again."""

    train: Literal["lora", "all"]
    model: str
    quantize: Literal["nf4"] | None


def load_trained(folder):
    """(network, processor) of a seed-N folder. Raises InputError when it holds no finished run."""
    settings = files.read_json(folder / "settings.json", Trained)
    if settings.train == "all":
        return load_base(folder / "final", settings.train)
    network, processor = load_base(settings.model, settings.train, settings.quantize)
    adapter = common.find(folder / "final")
    with pretrained.loading(adapter):
        network = peft.PeftModel.from_pretrained(network, adapter)
    common.check_finite(network, adapter)
    return network, processor


def write_tiny(folder):
    """A checkpoint of the real classes with 0.24 million random weights, for clips of up to a second.

    The deviation of these is our choice: with the classes' own 0.02 the signal fades in so narrow a model.
    """
    tokenizer, bytes_alone = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer, tokenizer.decoder = bytes_alone(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", END, "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    options = {"special_tokens": special, "show_progress": False, "initial_alphabet": bytes_alone.alphabet()}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, **options)
    tokenizer.train_from_iterator([SYSTEM, QUESTION, "system\nuser\nassistant\nAudio 1: "] * 10, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=END)
    # The real extractor pads to 30 s. A second is enough for these clips, and thirty times less work.
    extractor = transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=1)
    audio = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}
    audio |= {"num_mel_bins": 128, "max_source_positions": extractor.nb_max_frames // 2, "initializer_range": 0.08}
    text = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}
    text |= {"vocab_size": len(tokenizer), "initializer_range": 0.08, "bos_token_id": None}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids = {"audio_token_index": tokenizer.convert_tokens_to_ids("<|AUDIO|>"), "pad_token_id": tokenizer.pad_token_id}
    config = transformers.Qwen2AudioConfig(audio_config=audio, text_config=text, **ids)
    transformers.Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)
    transformers.Qwen2AudioProcessor(extractor, tokenizer).save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# What the model reads, and what it learns from


def read_clips(processor, waves, answers=None):
    """Tensors of a batch, padded on the left, on the model's side of `processor`.

    waves: list of (S,) at 16 kHz; answers: letters, to train on. Returns input_ids and attention_mask (B, T),
    input_features (B, mel bins, frames) and feature_attention_mask (B, frames).
    """
    audio_and_question = [{"type": "audio", "audio_url": "clip.wav"}, {"type": "text", "text": QUESTION}]
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": audio_and_question}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    texts = [prompt + answer + END for answer in answers] if answers else [prompt] * len(waves)
    # `audios=`, the keyword of older examples, was once ignored without a word; a rate that is not given likewise.
    return processor(text=texts, audio=waves, sampling_rate=data.SAMPLE_RATE, padding=True, return_tensors="pt")


def letter_ids(tokenizer):
    """{label: ids of the single tokens that write its letter}: plain, after a space, after a newline."""
    ids = {}
    for label, letter in LETTERS.items():
        found = [tokenizer.encode(before + letter, add_special_tokens=False) for before in ("", " ", "\n")]
        ids[label] = sorted({written[0] for written in found if len(written) == 1})
    return ids


def answer_loss(network, processor, waves, answers):
    """Summed cross-entropy of the answers' tokens, the letter and <|im_end|>: padded on the left, each row ends so."""
    batch = read_clips(processor, waves, answers).to(network.device)
    taught = [processor.tokenizer.encode(answer + END, add_special_tokens=False) for answer in answers]
    labels = batch["input_ids"][:, -len(taught[0]) :]  # (B, 2)
    if labels.tolist() != taught:
        raise cli.InputError(f"this checkpoint's tokenizer joins the answers {answers} with what stands before them")
    with common.autocast():
        logits = network(**batch).logits  # (B, T, V)
    before = logits[:, -labels.shape[1] - 1 : -1]  # each token is written where the one before it is read
    return F.cross_entropy(before.float().flatten(0, 1), labels.flatten(), reduction="sum")


def losses(network, processor, settings, waves, step):
    """The (ids, loss) of a step's clips, a batch at a time; the gradient: the mean over the clips."""
    for start in range(0, len(step), settings.batch_size):
        part = step[start : start + settings.batch_size]
        summed = answer_loss(network, processor, [waves[c.id] for c in part], [LETTERS[c.label] for c in part])
        yield [clip.id for clip in part], summed / len(step)


def train(network, processor, clips, settings, seed, folder):
    """Train on the clips of the train split, --batch-size x --accumulation of them a step."""
    waves = {clip.id: wave_of(clip, settings.output) for clip in clips}
    parts = partial(losses, network, processor, settings, waves)
    common.fine_tune(network, clips, settings.batch_size * settings.accumulation, parts, settings, seed, folder)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.inference_mode()
def classify(network, processor, waves, batch_size):
    """Probability of SPEECH for each wave: of an answer that can only be A or B, in any way of writing it."""
    network.eval()
    ids = letter_ids(processor.tokenizer)
    allowed = sorted(sum(ids.values(), []))
    speech = torch.tensor([token in ids["SPEECH"] for token in allowed])
    probabilities = []
    for start in range(0, len(waves), batch_size):
        batch = read_clips(processor, waves[start : start + batch_size]).to(network.device)
        with common.autocast():
            logits = network(**batch).logits[:, -1, allowed].float().cpu()  # (B, allowed)
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
    thresholds = [(t, below) for t in (order[1:] + order[:-1]) / 2 for below in (True, False)]
    _, threshold, below = max((np.mean((values < t) == (speech == below)), t, below) for t, below in thresholds)
    return [bool((flatness(wave_of(clip, output)) < threshold) == below) for clip in test_clips]


class Prediction(Clip):
    """A line of predictions.jsonl."""

    speech: float  # probability
    correct: bool
    flatness_correct: bool


def describe(clip, speech, by_flatness):
    """A line of predictions.jsonl. speech: probability; by_flatness: whether flatness says SPEECH."""
    right, by_flatness = (said == (clip.label == "SPEECH") for said in (speech > 0.5, by_flatness))
    return clip.model_dump() | {"speech": speech, "correct": right, "flatness_correct": by_flatness}


def accuracy(lines, key="correct"):
    """Accuracy with Wilson's interval, and one that takes clips of a speaker as dependent: bootstrap over groups."""
    right = np.array([line[key] for line in lines], dtype=np.float64)
    drawn = common.resampled_ratio(right, np.ones(len(right)), [line["group"] for line in lines])
    intervals = {"wilson": common.wilson(int(right.sum()), len(lines)), "bootstrap": metrics.interval(drawn)}
    return {"accuracy": right.mean(), "clips": len(lines), **intervals}


def show_results(runs: dict[int, list[dict]]) -> dict:
    """Print and return what the runs of all seeds got right. runs: {seed: lines of its predictions}."""
    any_run = next(iter(runs.values()))  # clips and baseline are the same in all
    results = {"flatness threshold": accuracy(any_run, "flatness_correct")}
    for seed, lines in runs.items():
        outcomes = ([line[key] for line in lines] for key in ("correct", "flatness_correct"))
        alone = dict(zip(("alone_right", "flatness_alone_right", "mcnemar_pvalue"), metrics.mcnemar(*outcomes)))
        results[f"model, seed {seed}"] = accuracy(lines) | alone
    rows = []
    for name, of in results.items():
        alone = f"{of['alone_right']}:{of['flatness_alone_right']}" if "alone_right" in of else ""
        pvalue = f"{of['mcnemar_pvalue']:.2g}" if alone else ""
        rows.append((name, [f"{of['accuracy']:.3f}", _range(of["wilson"]), _range(of["bootstrap"]), alone, pvalue]))
    caption = f"{len(any_run)} test clips of {len({line['group'] for line in any_run})} speakers and sources"
    columns = ["accuracy", "Wilson 95 %", "over speakers 95 %", "right alone, model:flatness", "McNemar's p"]
    cli.show_table(caption, columns, rows)
    return results | {"parts": show_parts(runs)}


def show_parts(runs):
    """Print and return accuracy by class, duration, SNR and kind: mean of the seeds, with Wilson's interval of one."""
    lines = [line for run in runs.values() for line in run]
    parts, rows = {}, []
    for key in ("label", "duration", "snr", "kind"):
        for value in sorted({line[key] for line in lines}):
            chosen = [line for line in lines if line[key] == value]
            clips, name = len(chosen) // len(runs), f"{key} {value}"
            share, by_flatness = (np.mean([line[of] for line in chosen]) for of in ("correct", "flatness_correct"))
            wilson = common.wilson(round(share * clips), clips)
            parts[name] = {"accuracy": share, "wilson": wilson, "flatness": by_flatness, "clips": clips}
            rows.append((name, [f"{share:.3f}", _range(wilson), f"{by_flatness:.3f}", str(clips)]))
    cli.show_table("by part, mean of the seeds", ["accuracy", "Wilson 95 %", "flatness", "clips"], rows)
    return parts


def _range(interval):
    return f"{interval[0]:.3f}-{interval[1]:.3f}"


# ----------------------------------------------------------------------------------------------------------------------
# All of it


def compare(first, second):
    """Print the difference of two runs on the same clips: exact McNemar, and a paired bootstrap over groups."""
    runs = [files.read_lines(folder / "predictions.jsonl", Prediction) for folder in (first, second)]
    described = [[line.model_dump(include=set(Clip.model_fields)) for line in run] for run in runs]
    if described[0] != described[1] or not described[0]:
        raise cli.InputError(
            f"--compare: {first} and {second} were tested on other clips; use the same --data, --kinds and --clip-seed"
        )
    right = [np.array([line.correct for line in run], dtype=np.float64) for run in runs]
    gain = right[0] - right[1]
    difference = common.resampled_ratio(gain, np.ones(len(gain)), [line.group for line in runs[0]])
    alone = metrics.mcnemar(*right)
    low, high = metrics.interval(difference)
    cli.say(*(f"{name} {values.mean():.3f} {folder}" for name, folder, values in zip("AB", (first, second), right)))
    cli.say(
        f"A - B {gain.mean():+.3f}, 95 % {low:+.3f} to {high:+.3f}, p = {metrics.sign_pvalue(difference):.2g} "
        f"(paired bootstrap over speakers and sources)",
        f"A alone is right {alone[0]} times, B alone {alone[1]} times: McNemar's exact test, p = {alone[2]:.2g}",
    )


def answer(run, paths):
    """Print the answer to each file, and how sure it is. Raises InputError for what no clip of a run is like."""
    waves = []
    for path in paths:
        wave, _ = sound.read_own(path, lowest_rate=data.SAMPLE_RATE)
        milliseconds = len(wave) * 1000 // data.SAMPLE_RATE
        if not DURATIONS[0] <= milliseconds <= DURATIONS[-1]:
            raise cli.InputError(f"{path}: {milliseconds:,} ms; cut out {DURATIONS[0]} to {DURATIONS[-1]:,} ms of it")
        waves.append(normalise(wave, path))
    network, processor = load_trained(run)
    for path, speech in zip(paths, classify(network, processor, waves, batch_size=1)):
        cli.say(f"{path} {'SPEECH' if speech > 0.5 else 'NONSPEECH'} {max(speech, 1 - speech):.3f}")


def run(settings: Settings) -> None:
    """Clips, then a model for each seed, then the table."""
    writes = ["clips", "clips.jsonl", "seed-*"]
    with common.new_run(settings, COMMAND, "results.json", writes, "torch", "transformers", "peft") as record:
        if settings.model != TINY:
            common.find(settings.model)  # a wrong name is said before clips are made
        clips = make_clips(settings)
        train_clips, test_clips = ([clip for clip in clips if clip.split == split] for split in SPLITS)
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(clip.kind for clip in clips).items()))
        cli.say(f"clips: {len(train_clips)} to train on, {len(test_clips)} to test on; {kinds}")
        baseline = flatness_baseline(train_clips, test_clips, settings.output)
        waves = [wave_of(clip, settings.output) for clip in test_clips]
        runs = {}
        for seed in settings.seeds:
            folder = settings.output / f"seed-{seed}"
            folder.mkdir(exist_ok=True)
            network, processor = new_model(settings, seed)
            train(network, processor, train_clips, settings, seed, folder)
            common.save(network, folder / "final", processor if settings.train == "all" else None)
            write_json(folder / "settings.json", record)
            probabilities = classify(network, processor, waves, settings.batch_size)
            runs[seed] = list(map(describe, test_clips, probabilities, baseline))
            common.write_lines(folder / "predictions.jsonl", runs[seed])
        write_json(settings.output / "results.json", show_results(runs))


def main() -> None:
    settings = cli.parse(Settings, __doc__.split("\n", 1)[0])
    check(settings)
    pretrained.quieten()
    if settings.compare:
        compare(*settings.compare)
    elif settings.trained:
        answer(settings.trained, settings.audio)
    else:
        run(settings)


if __name__ == "__main__":
    cli.run_script(COMMAND, main)
