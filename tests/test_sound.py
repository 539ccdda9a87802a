"""Sound files are decoded only where their headers can be believed."""

import os
import struct
import sys
from unittest.mock import Mock

from conftest import fifo, sound, tone
import numpy as np
import pytest
import soundfile

from support import cli
from support.sound import MOST_SAMPLES, SAMPLE_RATE, read_audio, read_sound_file, sound_files


def read(content):
    return read_audio(lambda: content)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_any_rate_is_read_as_the_same_tone_at_16_khz_with_its_channels_averaged(rate):
    both = sound(np.stack([tone(1, rate), 0 * tone(1, rate)], axis=1), rate)
    audio, expected = read(both), tone(1) / 2
    assert audio.dtype == np.float32 and abs(len(audio) - 16_000) <= 1
    inner = slice(800, 15_200)  # away from the filter's edges
    assert np.abs(audio[inner] - expected[inner]).max() < (0.005 if rate != 16_000 else 1e-9)


@pytest.mark.parametrize("form", ["WAV", "RF64", "W64", "WAVEX", "FLAC"])
def test_16_khz_mono_is_read_as_it_is(form):
    audio = read(sound(tone(0.1), format=form, subtype="PCM_24"))
    assert np.allclose(audio, tone(0.1), atol=1e-6)


def wav(samples, *chunks, size=None, whole=None, riff=b"RIFF", rate=SAMPLE_RATE):
    """Bytes of a 16-bit mono WAV with other chunks before its sound; size, whole: bytes that the header says."""
    order = "<" if riff == b"RIFF" else ">"
    sound = np.arange(samples, dtype=order + "i2").tobytes()
    form = struct.pack(order + "4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate % 2**32, 2, 16)
    headers = [struct.pack(order + "4sI", name, len(content)) for name, content in chunks]
    other = b"".join(h + content + b"\0" * (len(content) % 2) for h, (_, content) in zip(headers, chunks))
    size = len(sound) if size is None else size
    content = b"WAVE" + form + other + struct.pack(order + "4sI", b"data", size) + sound
    return riff + struct.pack(order + "I", len(content) if whole is None else whole) + content


CHUNKS = {
    "none": [],
    "odd": [(b"note", b"odd")],
    "nested": [(b"LIST", b"INFO" + b"ICMT\x0c\0\0\0data\0\0\x10\0tone")],  # no sound, though it says so
    "both": [(b"note", b"1"), (b"LIST", b"adtl" + b"labl\x04\0\0\0data"), (b"bext", b"\0" * 602)],
}


@pytest.mark.parametrize("chunks, riff", [*((name, b"RIFF") for name in CHUNKS), ("odd", b"RIFX")])
def test_a_wav_that_was_cut_off_says_what_is_missing(chunks, riff):
    content = wav(1000, *CHUNKS[chunks], riff=riff)
    assert len(read(content)) == 1000
    for missing in (1, 2, 1000):
        with pytest.raises(cli.InputError, match=f"cut off: .* 2,000 .* {2000 - missing:,} "):
            read(content[:-missing])


SIZES = [(0, 0), (8, 0), (36, 0), (2**32 - 1, 2**32 - 1), (0x7FFFF024, 0x7FFFF000), (2**31 - 1, 2**31 - 1)]


@pytest.mark.parametrize("riff", [b"RIFF", b"RIFX"])
@pytest.mark.parametrize("whole, size", SIZES)
def test_a_wav_from_a_pipe_says_no_size_and_is_read_to_its_end(whole, size, riff):
    known = read(wav(1000, *CHUNKS["odd"], riff=riff))
    piped = wav(1000, *CHUNKS["odd"], size=size, whole=whole, riff=riff)
    assert np.array_equal(read(piped), known) and len(known) == 1000


@pytest.mark.parametrize("rate", [4_000, 384_000])
def test_the_lowest_and_the_highest_rates_are_read(rate):
    assert abs(len(read(wav(rate, rate=rate))) - SAMPLE_RATE) <= 1


@pytest.mark.parametrize(
    "content, message",
    [
        (sound(np.zeros(0, np.float32)), "empty"),
        (sound(np.zeros(399, np.float32)), "399 samples at 16 kHz"),
        (sound(np.array([0.1] * 500 + [np.nan, np.inf], np.float32)), "2 samples that are not finite"),
        (sound(np.full((500, 2), [np.inf, -np.inf], np.float32)), "500 samples that are not finite"),
        (sound(np.full((500, 2), 3e38, np.float32)), "500 samples that are not finite"),
        (b"not a sound file", "not a readable sound file"),
        (None, "not a readable sound file"),  # a row of the hub without its bytes
        (wav(1000, size=0), "empty"),  # whatever comes after
        (wav(16_000, rate=0), "not a readable sound file"),
        (wav(16_000, rate=1), "1 Hz is below 4,000 Hz"),
        (wav(16_000, rate=3_999), "3,999 Hz is below"),
        (wav(16_000, rate=384_001), "384,001 Hz"),
        (wav(16_000, rate=1_000_000_007), "1,000,000,007 Hz"),
        (wav(16_000, rate=2**32 - 1), "Hz is below|not a readable"),
        # G.721 instead of 16-bit, which cannot be measured
        (sound(tone(0.1), format="AU")[:15] + b"\x17" + sound(tone(0.1), format="AU")[16:], "not a readable"),
        (sound(tone(0.1), format="AIFF")[:22], "not a readable"),  # libsndfile seeks to -1, in a callback
    ],
    ids=lambda value: "bytes" if isinstance(value, bytes) else value,  # some hold the time
)
@pytest.mark.filterwarnings("error")  # a second line
def test_bad_audio_is_named_and_nothing_else_is_printed(monkeypatch, content, message):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)  # what cffi calls when a callback fails
    with pytest.raises(cli.InputError, match=message):
        read(content)
    assert not printed


@pytest.mark.parametrize("frames", [2**36 - 1, 0])  # 0: unknown, which libsndfile takes for 2**63 - 1
def test_a_header_that_claims_more_samples_than_memory_is_refused(frames, monkeypatch):
    content = bytearray(sound(tone(0.1), format="FLAC"))
    content[21] = content[21] & 0xF0 | frames >> 32  # STREAMINFO's last 36 bits before the checksum
    content[22:26] = (frames & 2**32 - 1).to_bytes(4, "big")
    monkeypatch.setattr(soundfile.SoundFile, "read", None)  # nothing may be decoded
    with pytest.raises(cli.InputError, match=f"samples .*{MOST_SAMPLES:,}"):
        read(bytes(content))
    monkeypatch.setattr(soundfile.SoundFile, "read", Mock(side_effect=MemoryError))
    with pytest.raises(cli.InputError, match="MemoryError"):
        read(sound(tone(1)))


def written(content):
    return lambda path: path.write_bytes(content) and path


UNUSABLE = [  # in the place of a sound file
    (fifo, "is not a regular file"),
    (lambda path: path.parent, "Is a directory"),
    (written(b"no sound"), "not a readable sound file"),
    (written(wav(8000)[:-2]), "cut off"),
    (written(wav(16_000, rate=1)), "1 Hz is below 4,000 Hz"),
    (lambda path: path.touch() or os.truncate(path, 2**40) or path, "1,099,511,627,776 bytes"),
]


def test_sound_files_are_found_in_folders_too_and_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.wav", "a.FLAC", "b/1.ogg", "notes.txt"):
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in sound_files(tmp_path)] == ["a.FLAC", "b/1.ogg", "b/2.wav"]


def test_a_folder_without_recordings_or_with_a_name_that_is_not_utf_8_is_refused(tmp_path):
    with pytest.raises(cli.InputError, match=f"{tmp_path} has no recordings"):
        sound_files(tmp_path)
    open(os.fsencode(tmp_path) + b"/a\xff.wav", "w").close()
    with pytest.raises(cli.InputError, match=r"a\\udcff.wav' is not UTF-8: rename it"):
        sound_files(tmp_path)


@pytest.mark.parametrize(
    "make, message",
    [
        *UNUSABLE,
        (written(sound(tone(0.5, 8000), 8000)), "8,000 Hz is below 16,000 Hz"),
        (written(sound(tone(2.5))), "2.50 s is longer than 2 s"),
        (written(sound(np.ones(8000))), "100.0% of the samples are at full scale"),
        (written(sound(np.zeros(0))), "empty"),
        (written(sound(tone(1, 400_000), 400_000)), "400,000 Hz"),
    ],
)
def test_a_sound_file_that_would_mislead_is_refused_by_name(tmp_path, make, message):
    path = make(tmp_path / "one.wav")
    lowest = 0 if "4,000" in message else SAMPLE_RATE
    with pytest.raises(cli.InputError, match=f"^{path}.*{message}"):
        read_sound_file(path, longest=2, lowest_rate=lowest or 4_000)
