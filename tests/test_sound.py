"""Corpora by libsndfile, recordings of one's own by FFmpeg; what is wrong with either is said, never read."""

import os
from pathlib import Path
import shutil
import struct
import subprocess

from conftest import ROOT, sound, tone
import numpy as np
import pytest

from support import cli
from support import sound as sounds
from support.sound import CLIPPED, SAMPLE_RATE

CASES = Path(os.environ.get("AUDIO_CASES", ROOT.parent / "shared" / "cases" / "audio"))
has_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")


def read(content):
    audio = sounds.read_audio(lambda: content)
    sounds.check_level(audio)
    return audio


def read_own(content, **limits):
    return sounds.read_own(content, **limits)[0]


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_any_rate_is_read_as_the_same_tone_at_16_khz_with_channels_averaged(rate):
    both = sound(np.stack([tone(1, rate), 0 * tone(1, rate)], axis=1), rate)
    audio, expected = read(both), tone(1) / 2
    assert audio.dtype == np.float32 and abs(len(audio) - 16_000) <= 1
    inner = slice(800, 15_200)  # away from the filter's edges
    assert np.abs(audio[inner] - expected[inner]).max() < (0.005 if rate != 16_000 else 1e-9)


@pytest.mark.parametrize("form", ["WAV", "RF64", "WAVEX", "FLAC"])
def test_a_corpus_recording_is_read_as_it_is_and_refused_where_it_was_cut_off(form):
    content = sound(tone(1), format=form, subtype="PCM_24")
    assert np.allclose(read(content), tone(1), atol=1e-6)
    for missing in (3, 600, len(content) // 2):
        with pytest.raises(cli.InputError, match="cut off|not a readable"):
            read(content[:-missing])


def wav(size, riff=b"RIFF", rate=SAMPLE_RATE):
    """A 16-bit mono WAV of 1,000 samples after an odd chunk; size: bytes of sound that its header says."""
    order = "<" if riff == b"RIFF" else ">"
    samples = (1000 * np.sin(np.arange(1000) / 5)).astype(order + "i2").tobytes()
    form = struct.pack(order + "4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate % 2**32, 2, 16)
    other = struct.pack(order + "4sI", b"note", 11) + b"INFOdata\0\0\1\0"  # no sound, though it says so
    content = b"WAVE" + form + other + struct.pack(order + "4sI", b"data", size) + samples
    return riff + struct.pack(order + "I", min(len(content) - 2000 + size, 2**32 - 1)) + content


@pytest.mark.parametrize("riff", [b"RIFF", b"RIFX"])
@pytest.mark.parametrize("size", [2000, 0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_a_wav_from_a_pipe_or_a_killed_recorder_is_read_to_its_end(size, riff):
    assert len(read(wav(size, riff))) == 1000
    with pytest.raises(cli.InputError, match="its header says 2,002 bytes of sound, 2,000 are there"):
        read(wav(2002, riff))


NONSENSE = {  # in a corpus and of one's own
    "1000 samples that are not finite": np.full((1000, 2), [np.inf, -np.inf], np.float32),
    "its samples reach 16,384, and 1 is full scale": 32_768 * tone(1),
    "its 2 channels cancel each other": np.stack([tone(1), -tone(1)], axis=1),
    "all its samples are 0: there is no sound": np.zeros(8_000),
    "level -63.* is silence": 0.002 * tone(1),
    "399 samples at 16 kHz": tone(1)[:399],
    "3,999 Hz is below 4,000 Hz": 3_999,
    "400,000 Hz and 400,000 x 1 samples": 400_000,
}


@pytest.mark.parametrize("message", NONSENSE)
def test_what_would_train_or_score_nonsense_is_refused(message):
    wave = NONSENSE[message]
    content = sound(tone(1, wave), wave) if isinstance(wave, int) else sound(wave)
    readers = [read, read_own] if shutil.which("ffmpeg") else [read]
    for reader in readers:
        with pytest.raises(cli.InputError, match=message):
            reader(content)


# ----------------------------------------------------------------------------------------------------------------------
# One's own

REPORTED = {  # file of CASES: the seconds that must be there, or why it is refused
    "flac_length_unknown.flac": 0.5,
    "gsm610.wav": 0.5,
    "ogg_chained.ogg": 2.0,
    "ogg_without_eos.ogg": 1.0,
    "opus_chained.opus": 2.0,
    "vbr_loud_then_quiet.mp3": 1.0,
    "vbr_silence_first.mp3": 1.0,
    "cut_after_OggS.ogg": "cut off",
    "cut_in_last_page.ogg": "cut off",
}


@has_ffmpeg
@pytest.mark.skipif(not CASES.is_dir(), reason="no folder of sound files from public reports")
@pytest.mark.parametrize("name", REPORTED)
def test_sound_files_that_people_have_are_read_whole_or_refused(name):
    content, expected = (CASES / name).read_bytes(), REPORTED[name]
    if isinstance(expected, float):
        assert expected - 0.01 < len(read_own(content)) / SAMPLE_RATE < expected + 0.4
    else:
        with pytest.raises(cli.InputError, match=expected):
            read_own(content)
    if name == "gsm610.wav":
        with pytest.raises(cli.InputError, match="encoded as GSM610"):
            read(content)


MADE = {f"a.{container}": [] for container in ("mp3", "flac", "opus", "wav", "m4a")}
MADE |= {"a.ogg": ["-c:a", "libvorbis"], "a.webm": ["-c:a", "libopus"]}
MADE |= {"b.m4a": ["-movflags", "+faststart"]}  # the table of contents at the start


@has_ffmpeg
@pytest.mark.parametrize("name", MADE)
def test_every_container_of_telephones_and_browsers_is_read_and_a_cut_one_refused(tmp_path, name):
    (tmp_path / "in.wav").write_bytes(sound(np.stack([tone(3, 48_000)] * 2, axis=1), 48_000))
    subprocess.run(["ffmpeg", "-v", "error", "-i", "in.wav", *MADE[name], name], cwd=tmp_path, check=True)
    audio, rate = sounds.read_own((tmp_path / name).read_bytes(), longest=4)
    assert rate == 48_000 and len(audio) / SAMPLE_RATE == pytest.approx(3, abs=0.1)
    assert np.std(audio) == pytest.approx(np.std(tone(1)), rel=0.1)
    (tmp_path / "cut").write_bytes((tmp_path / name).read_bytes()[: (tmp_path / name).stat().st_size * 6 // 10])
    with pytest.raises(cli.InputError, match="cut off|not a readable"):
        read_own((tmp_path / "cut").read_bytes())
    with pytest.raises(cli.InputError, match="longer than 2.5 s: cut it"):
        read_own((tmp_path / name).read_bytes(), longest=2.5)
    assert len(read_own((tmp_path / name).read_bytes(), longest=3.1)) == len(audio)


@has_ffmpeg
@pytest.mark.parametrize("form", ["WAV", "MP3"])
def test_a_channel_at_full_scale_is_refused_in_every_format(form):
    clipped = np.clip(4 * tone(1, 44_100), -1, 1)
    with pytest.raises(cli.InputError, match=r"at full scale \(limit 1%\)"):
        read_own(sound(np.stack([clipped, 0.1 * clipped], axis=1), 44_100, format=form))
    assert len(read_own(sound(np.where(np.arange(16_000) < 0.9 * CLIPPED * 16_000, 1, tone(1)))))


@has_ffmpeg
def test_a_playlist_opens_nothing_and_a_decoder_is_bounded_in_time_and_bytes(tmp_path, monkeypatch):
    (tmp_path / "secret.wav").write_bytes(sound(tone(1)))
    for text in (f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/secret.wav\n", f"ffconcat version 1.0\nfile {tmp_path}/secret.wav"):
        with pytest.raises(cli.InputError, match="not a readable sound file.* give WAV, FLAC, MP3"):
            read_own(text.encode())
    with pytest.raises(cli.InputError, match="decodes to more than 4 MB"):
        read_own(sound(np.stack([tone(1, 192_000)] * 8, axis=1), 192_000, format="WAVEX", subtype="FLOAT"), longest=1)
    monkeypatch.setattr("support.sound.DECODING", 0.2)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for does, message in (("sleep 30", "more than 0.2 s: convert it to WAV"), ("kill -9 $$", "ffmpeg ended with -9")):
        (tmp_path / "ffmpeg").write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "ffmpeg").chmod(0o700)
        with pytest.raises(cli.InputError, match=message):
            read_own(sound(tone(1)))


def test_without_ffmpeg_a_corpus_is_read_and_ones_own_recording_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a.wav").write_bytes(sound(tone(1)))
    assert len(read((tmp_path / "a.wav").read_bytes())) == 16_000
    with pytest.raises(cli.InputError, match="a.wav: .*ffmpeg, which is not installed"):
        sounds.read_own(tmp_path / "a.wav")


def test_sound_files_are_found_in_folders_too_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.wav", "a.FLAC", "b/1.m4a", "notes.txt"):
        (tmp_path / name).touch()
    assert sounds.sound_files(tmp_path) == [tmp_path / name for name in ("a.FLAC", "b/1.m4a", "b/2.wav")]
    with pytest.raises(cli.InputError, match="has no recordings"):
        sounds.sound_files(tmp_path / "c")
