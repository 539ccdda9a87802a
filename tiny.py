"""A model and a corpus for a laptop without a network, both in the real formats.

    python tiny.py                      # a minute and a half on two cores
    python train.py --model tiny/model --data tiny/corpus ...
    python evaluate.py --adapter out/

tiny/model is a Phi4Multimodal checkpoint of about one million parameters, with tokenizer, feature extractor and a
`speech-lora/` adapter, pretrained here on clean synthetic speech: like the real one it hears and transcribes, and
knows nothing of scores. tiny/corpus is synthetic learner speech in the layout of the speechocean762 release. Nothing
in it is a language: a phone is a short chord, and the scores follow from what was done to the audio, so that there is
something to learn and a right answer. It shows that the code learns; it says nothing about real speech.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
import json
import math
import os
from pathlib import Path
import re
from typing import Annotated

import numpy as np
from pydantic import Field
import soundfile

import data
import prompts
from support import cli
from support.later import when_used

with when_used():
    import peft
    import tokenizers
    from tokenizers import pre_tokenizers
    import torch
    from torch import nn
    from torch.nn import functional as F
    import transformers

    import model as models
    from support import pretrained


@dataclass
class Settings:
    """What to write, and how much of it."""

    output: Path = Path("tiny")  # folder for model/ and corpus/
    steps: cli.Count = 1000  # of pretraining, on 32 clips each
    train_speakers: Annotated[int, Field(ge=1, le=4_999)] = 50  # four digits of an id name the speaker
    test_speakers: Annotated[int, Field(ge=1, le=4_999)] = 16  # others than in training
    per_speaker: Annotated[int, Field(ge=1, le=99_999)] = 20  # utterances; five digits of an id name one
    seed: cli.Seed = 0  # of corpus, weights and pretraining


ENTRIES = """WE W IY, SEE S IY, IT IH T, NINE N AY N, FIVE F AY V, BEAR B EH R, CALL K AO L, MARK M AA R K,
THREE TH R IY, ZERO Z IY R OW, SEVEN S EH V AH N, CHINA CH AY N AH"""
LEXICON = dict(entry.strip().split(" ", 1) for entry in ENTRIES.split(","))
PHONES = sorted({phone for phones in LEXICON.values() for phone in phones.split()})
LOW_TONES = (250, 400, 620, 900, 1250)  # Hz; a phone is one low and one high tone, all pairs distinct
HIGH_TONES = (1700, 2200, 2800, 3500, 4300)  # Hz
BREATHY = 0.3  # breath above which the encoder learns to hear it


# ----------------------------------------------------------------------------------------------------------------------
# Sound


@dataclass
class Voice:
    pitch: float  # Hz, of the pulses that both tones are shaped with
    tract: float  # factor on the tones
    rate: float  # factor on durations
    skill: float  # 0-1; what the four scores of a speaker have in common


@dataclass
class Sound:
    phone: str | None  # None: silence
    seconds: float
    gain: float = 1.0
    breath: float = 0.02  # noise, as a share of the tones' amplitude
    shift: float = 1.0  # factor on the tones


def new_voice(rng: np.random.Generator) -> Voice:
    return Voice(rng.uniform(90, 240), rng.uniform(0.95, 1.05), rng.uniform(0.85, 1.2), rng.uniform())


def synthesise(sounds: list[Sound], voice: Voice, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Waveform (S,) of a list of sounds, and for every sample which phone it is and whether it is breathy, (S, 2).

    The phone as its index in PHONES, -1 in silence.
    """
    pieces, labels = [], []
    for sound in sounds:
        samples = int(sound.seconds * data.SAMPLE_RATE)
        time = np.arange(samples) / data.SAMPLE_RATE
        wave = np.zeros(samples)
        index = -1 if sound.phone is None else PHONES.index(sound.phone)
        if sound.phone is not None:
            shift = voice.tract * sound.shift * rng.uniform(0.99, 1.01)
            low, high = LOW_TONES[index % 5] * shift, HIGH_TONES[index // 5] * shift
            wave = np.sin(2 * np.pi * low * time) + 0.7 * np.sin(2 * np.pi * high * time)
            wave *= 1 + 0.4 * np.sin(2 * np.pi * voice.pitch * time)
            wave += sound.breath * rng.standard_normal(samples)
            edge = np.minimum(1, np.minimum(time, time[::-1]) / 0.008)  # 8 ms fade, so that joints do not click
            wave *= 0.1 * sound.gain * edge
        pieces.append(wave)
        labels.append(np.tile((index, sound.breath > BREATHY), (samples, 1)))
    wave = np.concatenate(pieces)
    return (wave + 0.001 * rng.standard_normal(len(wave))).astype(np.float32), np.concatenate(labels)


def clean_speech(rng: np.random.Generator) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """One utterance of clear speech for pretraining: (words, phones, waveform, sample labels).

    In most utterances half of the phones are replaced at random and sound like the rest, so that the model learns to
    listen instead of recalling the words. Breath comes at random, too.
    """
    voice = new_voice(rng)
    words = list(rng.choice(list(LEXICON), rng.integers(1, 5)))
    replaced = 0.5 if rng.uniform() < 0.7 else 0.0
    sounds, phones = [_silence(rng)], []
    for word in words:
        for phone in LEXICON[word].split():
            phone = str(rng.choice(PHONES)) if rng.uniform() < replaced else phone
            phones.append(phone)
            breath = rng.uniform(0.4, 0.7) if rng.uniform() < 0.4 else rng.uniform(0.0, 0.1)
            sounds.append(Sound(phone, rng.uniform(0.06, 0.16) * voice.rate, rng.uniform(0.5, 1.2), breath))
        if rng.uniform() < 0.3:
            sounds.append(_silence(rng))
    sounds.append(_silence(rng))
    return words, phones, *synthesise(sounds, voice, rng)


def _silence(rng):
    return Sound(None, rng.uniform(0.03, 0.12))


# ----------------------------------------------------------------------------------------------------------------------
# Corpus


def learner_speech(rng: np.random.Generator, voice: Voice) -> tuple[dict, np.ndarray]:
    """One learner's utterance: (scores.json record, waveform). The scores follow from what was done to the audio."""
    words = list(rng.choice(list(LEXICON), rng.integers(2, 5)))
    error_rate = np.clip(0.55 * (1 - voice.skill) + rng.uniform(-0.15, 0.15), 0, 0.6)
    hesitation = np.clip(1 - voice.skill + rng.uniform(-0.3, 0.3), 0, 1)
    unevenness = np.clip(1 - voice.skill + rng.uniform(-0.3, 0.3), 0, 1)

    sounds, records, seconds, gains = [_silence(rng)], [], [], []
    pauses = errors = total = 0
    for word in words:
        canonical = LEXICON[word].split()
        mispronunciations = []
        for index, phone in enumerate(canonical):
            total += 1
            spoken, quality = phone, {}
            if rng.uniform() < error_rate:
                errors += 1
                if rng.uniform() < 0.2 and len(canonical) > 2:
                    spoken = None
                else:
                    spoken = str(rng.choice([p for p in PHONES if p != phone]))
                    quality = {"breath": 0.55, "shift": rng.choice((0.96, 1.04))}  # a substitute sounds slightly off
                mispronunciations.append({"index": index, "pronounced-phone": spoken or "<DEL>"})
            if spoken:
                seconds.append(0.105 * voice.rate * math.exp(rng.normal(0, 0.05 + 0.25 * unevenness)))
                gains.append(0.85 * math.exp(rng.normal(0, 0.05 + 0.3 * unevenness)))
                sounds.append(Sound(spoken, float(np.clip(seconds[-1], 0.05, 0.25)), gains[-1], **quality))
        records.append({"text": word, "phones": canonical, "mispronunciations": mispronunciations})
        if rng.uniform() < 0.15 + 0.8 * hesitation:
            pause = rng.uniform(0.05, 0.1) + 0.4 * hesitation * rng.uniform()
            pauses += pause
            sounds.append(Sound(None, pause))
    sounds.append(_silence(rng))

    spread = np.std(np.log(seconds)) + np.std(np.log(gains)) if len(seconds) > 1 else 0.0
    scores = {
        "accuracy": _score(10 - 16 * errors / total),
        "fluency": _score(10 - 9 * pauses / len(words) ** 0.5),
        "prosodic": _score(10 - 11 * spread),
    }
    scores["total"] = _score(0.5 * scores["accuracy"] + 0.25 * scores["fluency"] + 0.25 * scores["prosodic"])
    return {"text": " ".join(words), **scores, "words": records}, synthesise(sounds, voice, rng)[0]


def _score(value):
    return int(np.clip(round(value), *prompts.SCORE_RANGE))


def write_corpus(
    root: Path,
    speakers: dict[str, int],
    per_speaker: int,
    seed: int,
    speech: Callable[[np.random.Generator, Voice], tuple[dict, np.ndarray]] = learner_speech,
) -> None:
    """Write a corpus folder in the release's layout: what data.py reads of it, and who the speakers are.

    speakers: {"train": number, "test": number}; none is in both.
    speech: makes one utterance, as learner_speech does.
    """
    rng = np.random.default_rng((seed, 1))
    records, number = {}, 0
    for split, count in speakers.items():
        lines = defaultdict(list)
        for _ in range(count):
            number += 1
            speaker, voice = f"{number:04d}", new_voice(rng)
            ids = [f"{speaker}{i:05d}" for i in range(1, per_speaker + 1)]
            lines["spk2age"].append(f"{speaker}\t{rng.integers(6, 44)}")
            lines["spk2gender"].append(f"{speaker}\t{'f' if voice.pitch > 165 else 'm'}")
            (root / "WAVE" / f"SPEAKER{speaker}").mkdir(parents=True)
            for id in ids:
                records[id], wave = speech(rng, voice)
                path = f"WAVE/SPEAKER{speaker}/{id}.WAV"
                soundfile.write(root / path, wave, data.SAMPLE_RATE, format="WAV", subtype="PCM_16")
                lines["wav.scp"].append(f"{id}\t{path}")
                lines["utt2spk"].append(f"{id} {speaker}")
        (root / split).mkdir()
        for name, content in lines.items():
            (root / split / name).write_text("\n".join(content) + "\n")
    (root / "resource").mkdir()
    (root / "resource" / "scores.json").write_text(json.dumps(records, indent=1))


# ----------------------------------------------------------------------------------------------------------------------
# Model

# The real names; the first three are padding, image and audio
SPECIAL_TOKENS = ("<|endoftext|>", "<|endoftext10|>", "<|endoftext11|>", prompts.ASSISTANT, prompts.END, prompts.USER)
SPARE_ROWS = 8  # embedding rows beyond the tokenizer's, as the real model has them
POSITIONS = 4096
LAYERS = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.04}
ROTARY = [1.0] * 12  # of 32 dimensions a head, three quarters rotate, as in the real model
ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
BLOCKS = {"hidden_size": 96, "intermediate_size": 128, "num_blocks": 2, "num_attention_heads": 4}
CONVOLUTIONS = {"ext_pw_out_channel": 96, "depthwise_separable_out_channel": 96, "nemo_conv_channels": 24}
POSITION_BIAS = {"bias_max_distance": 100, "initializer_range": 0.04}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1}  # sees nothing
IMAGE = {"image_size": 28, "crop_size": 28, "patch_size": 14}
QUESTIONS = {"words": "Transcribe the words.", "phones": "Transcribe the phones.", "JSON": "Return as JSON:"}


def new_tokenizer() -> "transformers.PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer in which words, phones, JSON keys and the numbers 0-10 are one token each.

    So is every line of the two prompts: with an ordinary tokenizer the APA prompt alone has over 500 tokens, most of
    a tiny model's work.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    answers = [prompts.mdd_target(*lists) for lists in (("", PHONES), (" ".join(LEXICON), reversed(PHONES)))]
    answers += [prompts.apa_target(dict.fromkeys(prompts.SCORES, score)) for score in range(11)]
    answers += [*LEXICON, *PHONES, *(f" {word}" for word in (*LEXICON, *PHONES))]
    settings = {"special_tokens": list(SPECIAL_TOKENS), "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1000, show_progress=False, **settings)
    tokenizer.train_from_iterator(answers * 10, trainer)
    lines = {line for prompt in prompts.PROMPTS.values() for line in re.findall(r"[^\n]+\n*", prompt)}
    tokenizer.add_tokens(sorted(lines | set(QUESTIONS.values()), key=lambda line: (-len(line), line)))
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS[0])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **ends)


def new_network(tokenizer: "transformers.PreTrainedTokenizerFast") -> "transformers.Phi4MultimodalForCausalLM":
    """A Phi4Multimodal of about a million parameters with random weights."""
    end_of_text, image, audio = (tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS[:3])
    config = transformers.Phi4MultimodalConfig(
        **LAYERS,
        **HEADS,
        vocab_size=len(tokenizer) + SPARE_ROWS,
        max_position_embeddings=POSITIONS,
        original_max_position_embeddings=POSITIONS,
        rope_parameters={**ROPE, "short_factor": ROTARY, "long_factor": ROTARY},
        bos_token_id=end_of_text,
        eos_token_id=[end_of_text, tokenizer.convert_tokens_to_ids(prompts.END)],
        pad_token_id=end_of_text,
        audio_config={**BLOCKS, **CONVOLUTIONS, **POSITION_BIAS, "audio_token_id": audio},
        vision_config={**VISION, **IMAGE, "image_token_id": image},
    )
    network = transformers.Phi4MultimodalForCausalLM(config)
    # With transformers' small normal weights the signal fades in three ReLU layers, and some seeds never learn to hear.
    for module in network.model.embed_tokens_extend.audio_embed.encoder.embed.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining


@dataclass
class Clip:
    words: list[str]
    phones: list[str]
    features: "torch.Tensor"  # (F, 80)
    labels: np.ndarray  # (A, 2, 2), of `synthesise`, at 20 and 60 of the 80 ms of every embedding
    audio: "torch.Tensor | None" = None  # (A, D), its embeddings, once the encoder has been trained


class Pretraining:
    """Clean synthetic speech to text, in two parts.

    Hearing: audio encoder and projector learn which phone sounds in each frame, and whether it is breathy. Without a
    loss on each frame no alignment of audio and text appears in so few steps, and an encoder that learns phones alone
    forgets how they sound, which the accuracy of learner speech follows from. Writing: the language model learns to
    write what was heard, the words or the phones, and a little text to JSON. The encoder stays as it is then, so each
    clip is embedded once.
    """

    BATCH = 32  # clips a step
    HEARING = 0.2  # share of the steps
    PEAK = 3e-3  # learning rate
    WARMUP = 0.05  # share of a part's steps
    BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 0.01, 1.0
    WORDS = 0.15  # share of the clips that are to be written as words; the others as phones
    TEXT_ONLY = 0.03  # share of examples without audio, so that JSON keys and digits have embeddings

    def __init__(self, model: "models.SpeechModel", seed: int, clips: int) -> None:
        self.model = model
        self.encode = cache(model.tokenizer.encode)  # each clip is drawn some eight times
        self.rng = np.random.default_rng((seed, 2))
        self.frame_head = nn.Linear(model.core.config.hidden_size, 2 * (len(PHONES) + 2))  # thrown away afterwards
        self.clips = sorted((self._clip() for _ in range(clips)), key=lambda clip: len(clip.features))
        features = torch.cat([clip.features for clip in self.clips])  # (sum of F, 80)
        normalisation = model.audio.encoder.encoder_embedding  # carried by the real encoder, too
        normalisation.global_mean.copy_(features.mean(0))
        normalisation.global_invstd.copy_(1 / features.std(0))

    def run(self, steps: int) -> None:
        """Train all weights, those of the audio first."""
        hearing = math.ceil(self.HEARING * steps)
        self._train("hearing", hearing, self._hearing_loss, self.model.audio, self.frame_head)
        with torch.no_grad():
            for first in range(0, len(self.clips), self.BATCH):
                clips = self.clips[first : first + self.BATCH]
                for clip, audio in zip(clips, models.encode_audio(self.model.audio, [clip.features for clip in clips])):
                    clip.audio = audio
        self.model.audio.requires_grad_(False)
        self._train("writing", steps - hearing, self._writing_loss, self.model)

    def _train(self, name, steps, loss_of, *modules):
        parameters = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
        optimiser = torch.optim.AdamW(parameters, betas=self.BETAS, weight_decay=self.WEIGHT_DECAY, fused=True)
        bar = cli.Progress(range(steps), desc=name, unit="step")
        for step in bar:
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimiser.param_groups:
                group["lr"] = self.PEAK * min((step + 1) / (self.WARMUP * steps), cosine)
            start = self.rng.integers(max(1, len(self.clips) - self.BATCH + 1))  # of similar length: little padding
            loss = loss_of(self.clips[start : start + self.BATCH])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, self.CLIP)
            optimiser.step()
            optimiser.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}")

    def _hearing_loss(self, clips):
        audio = models.encode_audio(self.model.audio, [clip.features for clip in clips])
        labels = torch.as_tensor(np.concatenate([clip.labels for clip in clips])).view(-1, 2)  # (2 x sum of A, 2)
        logits = self.frame_head(torch.cat(audio)).view(len(labels), -1)  # (2 x sum of A, silence + phones + breathy)
        phones, breathy = labels[:, 0], labels[:, 1].float()
        breath_loss = F.binary_cross_entropy_with_logits(logits[:, -1], breathy)
        return F.cross_entropy(logits[:, :-1], phones + 1) + breath_loss

    def _writing_loss(self, clips):
        rows, audio = [], []
        for clip in clips:
            if self.rng.uniform() < self.TEXT_ONLY:
                rows.append(self._example(*self._json_task(clip), audio_tokens=0))
                continue
            task, answer = ("words", clip.words) if self.rng.uniform() < self.WORDS else ("phones", clip.phones)
            rows.append(self._example(QUESTIONS[task], " ".join(answer), audio_tokens=len(clip.audio)))
            audio.append(clip.audio)
        batch = data.collate(rows, self.model.pad_id)
        return self.model.loss(batch, audio) / (batch.labels != data.IGNORE).sum()

    def _json_task(self, clip):
        if self.rng.uniform() < 0.5:
            scores = {name: int(self.rng.integers(0, 11)) for name in prompts.SCORES}
            return f"{QUESTIONS['JSON']} {' '.join(map(str, scores.values()))}", prompts.apa_target(scores)
        question = f"{QUESTIONS['JSON']} {' '.join(clip.words + clip.phones)}"
        return question, prompts.mdd_target(" ".join(clip.words), clip.phones)

    def _clip(self):
        words, phones, wave, labels = clean_speech(self.rng)
        features = self.model.extractor(wave, sampling_rate=data.SAMPLE_RATE)["audio_input_features"][0]
        starts = np.arange(0, len(features), data.FRAMES_PER_TOKEN) * data.HOP  # (A,)
        at = starts[:, None] + np.array([20, 60]) * data.SAMPLE_RATE // 1000  # (A, 2)
        return Clip(words, phones, features, labels[np.minimum(at, len(labels) - 1)])

    def _example(self, question, answer, audio_tokens):
        prompt = self.encode(prompts.USER) + [self.model.audio_id] * audio_tokens
        prompt += self.encode(f"{question}{prompts.END}{prompts.ASSISTANT}")
        return data.Example(None, "pretraining", prompt, self.encode(answer + prompts.END))


def write_model(folder: Path, steps: int, seed: int, clips: int = 3000) -> None:
    """Pretrain a tiny model and write it as a checkpoint folder in the real format."""
    pretrained.quieten()
    torch.manual_seed(seed)
    tokenizer, extractor = new_tokenizer(), transformers.Phi4MultimodalFeatureExtractor()
    network = new_network(tokenizer)
    targets = [name for name, _ in network.named_modules() if re.fullmatch(models.LORA_TARGETS, name)]
    initial = {name: network.get_submodule(name).weight.detach().clone() for name in targets}
    tokenizer.save_pretrained(folder)  # as the real one is: without control tokens
    Pretraining(models.SpeechModel(network, tokenizer, extractor), seed, clips).run(steps)
    extractor.save_pretrained(folder)
    with torch.no_grad():
        speech = split_off_adapter(network, initial)
    # The real adapter lists suffixes, which name modules of the audio encoder too: model.py must not fall for it.
    speech.peft_config["default"].target_modules = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    speech.save_pretrained(folder / pretrained.SPEECH_ADAPTER)
    speech.unload().save_pretrained(folder)


def split_off_adapter(
    network: "transformers.Phi4MultimodalForCausalLM", initial: dict[str, "torch.Tensor"], rank: int = 8
) -> "peft.PeftModel":
    """Move the largest part of what pretraining changed in the language model into a LoRA, as the real model has it.

    Base and adapter together compute what the network computed before; the base alone hears badly.
    """
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=models.LORA_TARGETS, task_type="CAUSAL_LM")
    network = peft.get_peft_model(network, config)
    for name, before in initial.items():
        layer = network.base_model.model.get_submodule(name)
        left, sizes, right = torch.linalg.svd(layer.weight - before, full_matrices=False)
        layer.lora_B["default"].weight.copy_(left[:, :rank] * sizes[:rank])  # (out, rank)
        layer.lora_A["default"].weight.copy_(right[:rank])  # (rank, in)
        layer.get_base_layer().weight.sub_(layer.get_delta_weight("default"))
    return network


def main() -> None:
    """Write tiny/corpus and tiny/model."""
    settings = cli.parse(Settings, __doc__)
    speakers = {"train": settings.train_speakers, "test": settings.test_speakers}
    corpus, model = settings.output / "corpus", settings.output / "model"
    for folder in (corpus, model):
        if os.path.lexists(folder):
            raise cli.InputError(f"{folder} exists already: remove it or choose another --output")
    model.mkdir(parents=True)
    write_corpus(corpus, speakers, settings.per_speaker, settings.seed)
    cli.say(f"{corpus}: {data.describe(data.read_corpus(corpus, 'train'))}")
    write_model(model, settings.steps, settings.seed)
    cli.say(f"{model}: written")


if __name__ == "__main__":
    cli.run_script("tiny.py", main)
