"""A model and a corpus for a laptop without a network, both in the real formats.

    python tiny.py                      # about three minutes on two cores
    python train.py --model tiny/model --data tiny/corpus ...
    python evaluate.py --adapter out/

tiny/model is a Phi4Multimodal checkpoint of about one million parameters, with tokenizer, feature extractor and a
`speech-lora/` adapter, pretrained here on clean synthetic speech: like the real one it hears and transcribes, and
knows nothing of scores. tiny/corpus is synthetic learner speech in the layout of the speechocean762 release. Nothing
in it is a language: a phone is a short chord, and the scores follow from what was done to the audio, so that there is
something to learn and a right answer. It shows that the code learns; it says nothing about real speech.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass
import json
import math
import os
from pathlib import Path
import re

from model import LORA_TARGETS, SPEECH_ADAPTER, SpeechModel  # first: it quiets the libraries it imports

# isort: split
import numpy as np
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
import torch
from torch import nn
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    PreTrainedTokenizerFast,
)

import data
import prompts
from support import cli, files

MOST_SPEAKERS, MOST_UTTERANCES = 9_999, 99_999  # four digits of an id name the speaker, five the utterance
LEXICON = {
    "WE": "W IY",
    "SEE": "S IY",
    "IT": "IH T",
    "NINE": "N AY N",
    "FIVE": "F AY V",
    "BEAR": "B EH R",
    "CALL": "K AO L",
    "MARK": "M AA R K",
    "THREE": "TH R IY",
    "ZERO": "Z IY R OW",
    "SEVEN": "S EH V AH N",
    "CHINA": "CH AY N AH",
}
PHONES = sorted({phone for phones in LEXICON.values() for phone in phones.split()})
LOW_TONES = (250, 400, 620, 900, 1250)  # Hz; a phone is one low and one high tone, all pairs distinct
HIGH_TONES = (1700, 2200, 2800, 3500, 4300)  # Hz


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


def new_voice(rng):
    return Voice(rng.uniform(90, 240), rng.uniform(0.95, 1.05), rng.uniform(0.85, 1.2), rng.uniform())


def synthesise(sounds, voice, rng):
    """Waveform (S,) of a list of sounds, and for every sample the index of its phone in PHONES, -1 in silence."""
    pieces, labels = [], []
    for sound in sounds:
        samples = int(sound.seconds * data.SAMPLE_RATE)
        time = np.arange(samples) / data.SAMPLE_RATE
        wave = np.zeros(samples)
        if sound.phone is not None:
            index = PHONES.index(sound.phone)
            shift = voice.tract * sound.shift * rng.uniform(0.99, 1.01)
            low, high = LOW_TONES[index % 5] * shift, HIGH_TONES[index // 5] * shift
            wave = np.sin(2 * np.pi * low * time) + 0.7 * np.sin(2 * np.pi * high * time)
            wave *= 1 + 0.4 * np.sin(2 * np.pi * voice.pitch * time)
            wave += sound.breath * rng.standard_normal(samples)
            edge = np.minimum(1, np.minimum(time, time[::-1]) / 0.008)  # 8 ms fade, so that joints do not click
            wave *= 0.1 * sound.gain * edge
        pieces.append(wave)
        labels.append(np.full(samples, -1 if sound.phone is None else PHONES.index(sound.phone)))
    wave = np.concatenate(pieces)
    return (wave + 0.001 * rng.standard_normal(len(wave))).astype(np.float32), np.concatenate(labels)


def clean_speech(rng, most_words):
    """One utterance of clear speech for pretraining: (words, phones, waveform, sample labels).

    In most utterances half of the phones are replaced at random and sound as clear as the rest, so that the model
    learns to listen instead of recalling the words.
    """
    voice = new_voice(rng)
    words = list(rng.choice(list(LEXICON), rng.integers(1, most_words + 1)))
    replaced = 0.5 if rng.uniform() < 0.7 else 0.0
    sounds, phones = [_silence(rng)], []
    for word in words:
        for phone in LEXICON[word].split():
            phone = str(rng.choice(PHONES)) if rng.uniform() < replaced else phone
            phones.append(phone)
            breath = rng.uniform(0.0, 0.15)
            sounds.append(Sound(phone, rng.uniform(0.06, 0.16) * voice.rate, rng.uniform(0.5, 1.2), breath))
        if rng.uniform() < 0.3:
            sounds.append(_silence(rng))
    sounds.append(_silence(rng))
    return words, phones, *synthesise(sounds, voice, rng)


def _silence(rng, shortest=0.03, longest=0.12):
    return Sound(None, rng.uniform(shortest, longest))


# ----------------------------------------------------------------------------------------------------------------------
# Corpus


def learner_speech(rng, voice):
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
                label = {"canonical-phone": phone, "index": index, "pronounced-phone": spoken or "<DEL>"}
                mispronunciations.append(label)
            if spoken:
                seconds.append(0.105 * voice.rate * math.exp(rng.normal(0, 0.05 + 0.25 * unevenness)))
                gains.append(0.85 * math.exp(rng.normal(0, 0.05 + 0.3 * unevenness)))
                sounds.append(Sound(spoken, float(np.clip(seconds[-1], 0.05, 0.25)), gains[-1], **quality))
        records.append(_word_record(word, canonical, mispronunciations))
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
    record = {"text": " ".join(words), **scores, "completeness": 10.0, "words": records}
    return record, synthesise(sounds, voice, rng)[0]


def _score(value):
    low, high = prompts.SCORE_RANGE
    return int(np.clip(round(value), low, high))


def _word_record(word, canonical, mispronunciations):
    accuracies = [2.0] * len(canonical)
    for label in mispronunciations:
        accuracies[label["index"]] = 0.0
    accuracy = round(10 * sum(accuracies) / (2 * len(canonical)))
    return {
        "text": word,
        "phones": canonical,
        "phones-accuracy": accuracies,
        "accuracy": accuracy,
        "stress": 10,
        "total": accuracy,
        "mispronunciations": mispronunciations,
    }


def write_corpus(root, speakers, per_speaker, seed, speech=learner_speech):
    """Write a corpus folder in the release's layout. speakers: {"train": number, "test": number}; none is in both.

    speech: makes one utterance, as learner_speech does.
    """
    import soundfile

    rng = np.random.default_rng((seed, 1))
    records, number = {}, 0
    for split, count in speakers.items():
        lines = defaultdict(list)
        for _ in range(count):
            number += 1
            speaker, voice = f"{number:04d}", new_voice(rng)
            ids = [f"{speaker}{i:05d}" for i in range(1, per_speaker + 1)]
            lines["spk2utt"].append(f"{speaker} {' '.join(ids)}")
            lines["spk2age"].append(f"{speaker}\t{rng.integers(6, 44)}")
            lines["spk2gender"].append(f"{speaker}\t{'f' if voice.pitch > 165 else 'm'}")
            (root / "WAVE" / f"SPEAKER{speaker}").mkdir(parents=True)
            for id in ids:
                records[id], wave = speech(rng, voice)
                path = f"WAVE/SPEAKER{speaker}/{id}.WAV"
                soundfile.write(root / path, wave, data.SAMPLE_RATE, format="WAV", subtype="PCM_16")
                lines["wav.scp"].append(f"{id}\t{path}")
                lines["text"].append(f"{id}\t{records[id]['text']}")
                lines["utt2spk"].append(f"{id} {speaker}")
        (root / split).mkdir()
        for name, content in lines.items():
            (root / split / name).write_text("\n".join(content) + "\n")
    (root / "resource").mkdir()
    (root / "resource" / "scores.json").write_text(json.dumps(records, indent=1))


# ----------------------------------------------------------------------------------------------------------------------
# Model


SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|endoftext10|>", "<|endoftext11|>"),  # the real names of padding, image, audio
    *(prompts.ASSISTANT, prompts.END, prompts.USER),
)
SPARE_ROWS = 8  # embedding rows beyond the tokenizer's, as the real model has them


QUESTIONS = {"words": "Transcribe the words.", "phones": "Transcribe the phones.", "JSON": "Return as JSON:"}


def new_tokenizer():
    """A byte-level BPE tokenizer in which words, phones, JSON keys and the numbers 0-10 are one token each.

    So is every line of the two prompts: with an ordinary tokenizer the APA prompt alone has over 500 tokens, most of
    a tiny model's work.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    answers = [prompts.mdd_target(*lists) for lists in (("", PHONES), (" ".join(LEXICON), reversed(PHONES)))]
    answers += [prompts.apa_target(dict.fromkeys(prompts.SCORES, score)) for score in range(11)]
    answers += [*LEXICON, *PHONES, *(f" {word}" for word in (*LEXICON, *PHONES))]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(answers * 10, trainer)
    lines = {line for prompt in prompts.PROMPTS.values() for line in re.findall(r"[^\n]+\n*", prompt)}
    tokenizer.add_tokens(sorted(lines | set(QUESTIONS.values()), key=len, reverse=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        model_max_length=4096,
    )


def new_network(tokenizer):
    """A Phi4Multimodal of about a million parameters with random weights."""
    end_of_text, image, audio = (tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS[:3])
    rotary = 12  # of 32 dimensions a head, three quarters rotate, as in the real model
    config = Phi4MultimodalConfig(
        vocab_size=len(tokenizer) + SPARE_ROWS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        initializer_range=0.04,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0] * rotary,
            "long_factor": [1.0] * rotary,
        },
        bos_token_id=end_of_text,
        eos_token_id=[end_of_text, tokenizer.convert_tokens_to_ids(prompts.END)],
        pad_token_id=end_of_text,
        audio_config={
            "hidden_size": 96,
            "intermediate_size": 128,
            "num_blocks": 2,
            "num_attention_heads": 4,
            "ext_pw_out_channel": 96,
            "depthwise_separable_out_channel": 96,
            "nemo_conv_channels": 24,
            "bias_max_distance": 100,
            "initializer_range": 0.04,
            "audio_token_id": audio,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "image_size": 28,
            "crop_size": 28,
            "patch_size": 14,
            "image_token_id": image,
        },
    )
    network = Phi4MultimodalForCausalLM(config)
    # With transformers' small normal weights the signal fades in three ReLU layers, and some seeds never learn to hear.
    for module in network.model.embed_tokens_extend.audio_embed.encoder.embed.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining


class Pretraining:
    """Clean synthetic speech to text: the words or the phones, and a little text to JSON."""

    BATCH = 32  # clips a step
    PEAK = 2e-3  # learning rate
    WARMUP = 0.05  # share of the steps
    BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 0.01, 1.0
    SINGLE_WORDS = 0.15  # share of the steps, the first ones, on clips of one word
    WORDS = 0.3  # share of the clips that are to be written as words; the others as phones
    TEXT_ONLY = 0.03  # share of examples without audio, so that JSON keys and digits have embeddings

    def __init__(self, model, seed, clips):
        self.model = model
        self.rng = np.random.default_rng((seed, 2))
        # Without a loss on each frame no alignment of audio and text appears in this many steps. Two labels an
        # embedding, at 20 and 60 of its 80 ms; the head is thrown away.
        self.frame_head = nn.Linear(model.core.config.hidden_size, 2 * (len(PHONES) + 1))
        self.words, self.clips = self._clips(clips // 4, most_words=1), self._clips(clips, most_words=4)

    def set_normalisation(self):
        """Mean and deviation of the features, as the real encoder carries them."""
        features = torch.cat([features for _, _, features, _ in self.clips])  # (sum of F, 80)
        norm = self.model.core.model.embed_tokens_extend.audio_embed.encoder.encoder_embedding
        norm.global_mean.copy_(features.mean(0))
        norm.global_invstd.copy_(1 / features.std(0))

    def run(self, steps):
        """Train all weights: the answers, and a phone for every frame."""
        parameters = [*self.model.parameters(), *self.frame_head.parameters()]
        optimiser = torch.optim.AdamW(parameters, betas=self.BETAS, weight_decay=self.WEIGHT_DECAY)
        bar = tqdm(range(steps), desc="pretraining", unit="step")
        for step in bar:
            progress = step / steps
            rate = self.PEAK * min((step + 1) / (self.WARMUP * steps), 0.5 * (1 + math.cos(math.pi * progress)))
            for group in optimiser.param_groups:
                group["lr"] = rate
            loss, frame_loss = self._losses(self.words if progress < self.SINGLE_WORDS else self.clips)
            (loss + frame_loss).backward()
            nn.utils.clip_grad_norm_(parameters, self.CLIP)
            optimiser.step()
            optimiser.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", frames=f"{frame_loss.item():.3f}")

    def _losses(self, clips):
        rows, chosen = [], []
        for index in self.rng.integers(len(clips), size=self.BATCH):
            words, phones, features, frame_labels = clips[index]
            if self.rng.uniform() < self.TEXT_ONLY:
                rows.append(self._encode(*self._json_task(words, phones), audio_tokens=0))
                continue
            task, answer = ("words", words) if self.rng.uniform() < self.WORDS else ("phones", phones)
            rows.append(self._encode(QUESTIONS[task], " ".join(answer), audio_tokens=len(frame_labels)))
            chosen.append((features, frame_labels))
        audio = self.model.encode_audio([features for features, _ in chosen])
        batch = data.collate(rows, self.model.pad_id, self.model.audio_id)
        loss = self.model.loss(batch, audio) / len(batch.targets)

        logits = self.frame_head(torch.cat(audio)).view(-1, len(PHONES) + 1)  # (2 x sum of A, phones + silence)
        targets = torch.as_tensor(np.concatenate([labels for _, labels in chosen]).reshape(-1) + 1)
        return loss, F.cross_entropy(logits, targets)

    def _json_task(self, words, phones):
        if self.rng.uniform() < 0.5:
            scores = {name: int(self.rng.integers(0, 11)) for name in prompts.SCORES}
            return f"{QUESTIONS['JSON']} {' '.join(map(str, scores.values()))}", prompts.apa_target(scores)
        return f"{QUESTIONS['JSON']} {' '.join(words + phones)}", prompts.mdd_target(" ".join(words), phones)

    def _clips(self, number, most_words):
        clips = []
        for _ in range(number):
            words, phones, wave, labels = clean_speech(self.rng, most_words)
            clips.append((words, phones, self._features(wave), self._frame_labels(labels)))
        return clips

    def _features(self, wave):
        return self.model.extractor(wave, sampling_rate=data.SAMPLE_RATE)["audio_input_features"][0]

    def _frame_labels(self, sample_labels):
        """Phone indices (A, 2) at 20 and 60 ms of every embedding."""
        frames = (len(sample_labels) - data.FRAME) // data.HOP + 1
        starts = np.arange(-(-frames // data.FRAMES_PER_TOKEN)) * data.FRAMES_PER_TOKEN * data.HOP
        at = starts[:, None] + np.array([20, 60]) * data.SAMPLE_RATE // 1000
        return sample_labels[np.minimum(at, len(sample_labels) - 1)]

    def _encode(self, question, answer, audio_tokens):
        encode = self.model.tokenizer.encode
        prompt = encode(prompts.USER) + [self.model.audio_id] * audio_tokens
        prompt += encode(f"{question}{prompts.END}{prompts.ASSISTANT}")
        return data.Example(None, "pretraining", prompt, encode(answer + prompts.END))


def write_model(folder, steps, seed, clips=6000):
    """Pretrain a tiny model and write it as a checkpoint folder in the real format."""
    torch.manual_seed(seed)
    tokenizer, extractor = new_tokenizer(), Phi4MultimodalFeatureExtractor()
    network = new_network(tokenizer)
    targets = [name for name, _ in network.named_modules() if re.fullmatch(LORA_TARGETS, name)]
    initial = {name: network.get_submodule(name).weight.detach().clone() for name in targets}
    pretraining = Pretraining(SpeechModel(network, tokenizer, extractor), seed, clips)
    pretraining.set_normalisation()
    pretraining.run(steps)

    tokenizer.save_pretrained(folder)
    extractor.save_pretrained(folder)
    speech = split_off_adapter(network, initial)
    # The real adapter lists suffixes, which name modules of the audio encoder too: model.py must not fall for it.
    speech.peft_config["default"].target_modules = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    speech.save_pretrained(folder / SPEECH_ADAPTER)
    speech.unload().save_pretrained(folder)


@torch.no_grad()
def split_off_adapter(network, initial, rank=8):
    """Move the largest part of what pretraining changed in the language model into a LoRA, as the real model has it.

    Base and adapter together compute what the network computed before; the base alone hears badly.
    """
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
    network = get_peft_model(network, config)
    for name, before in initial.items():
        layer = network.base_model.model.get_submodule(name)
        left, sizes, right = torch.linalg.svd(layer.weight - before, full_matrices=False)
        layer.lora_B["default"].weight.copy_(left[:, :rank] * sizes[:rank])  # (out, rank)
        layer.lora_A["default"].weight.copy_(right[:rank])  # (rank, in)
        layer.get_base_layer().weight.sub_(layer.get_delta_weight("default"))
    return network


def main():
    """Write tiny/corpus and tiny/model."""
    parser = cli.ArgumentParser(
        description=__doc__, usage="python tiny.py [options]", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("tiny"), help="folder for model/ and corpus/ (tiny)")
    add = parser.add_argument
    add("--steps", type=cli.positive_int, default=1000, help="pretraining steps of 32 clips (1000)")
    add("--train-speakers", type=cli.positive_int, default=50, help="20 utterances each (50)")
    add("--test-speakers", type=cli.positive_int, default=16, help="others than in training (16)")
    add("--per-speaker", type=cli.positive_int, default=20, help="utterances (20)")
    add("--seed", type=cli.seed, default=0, help="of corpus, weights and pretraining (0)")
    args = parser.parse_args()
    if args.train_speakers + args.test_speakers > MOST_SPEAKERS or args.per_speaker > MOST_UTTERANCES:
        parser.error(
            f"{args.train_speakers:,} + {args.test_speakers:,} speakers of {args.per_speaker:,} utterances "
            f"are above what ids of this form tell apart: {MOST_SPEAKERS:,} of {MOST_UTTERANCES:,}"
        )
    for folder in (args.output / "corpus", args.output / "model"):
        if os.path.lexists(folder):
            parser.error(f"{folder} exists already: remove it or choose another --output")
    files.make_folder(args.output, "--output")
    speakers = {"train": args.train_speakers, "test": args.test_speakers}
    write_corpus(args.output / "corpus", speakers, args.per_speaker, args.seed)
    print(f"{args.output}/corpus: {data.describe(data.read_corpus(args.output / 'corpus', 'train'))}")
    write_model(args.output / "model", args.steps, args.seed)
    print(f"{args.output}/model: written")


if __name__ == "__main__":
    cli.run_script("tiny.py", main)
