"""Sound files: decoded only where the header can be believed.

Its few bytes may ask for gigabytes, say more than the file has, or lead libsndfile astray. Every fault is one
InputError.
"""

import io
import math
from pathlib import Path
import re
import struct

import numpy as np

from support import files
from support.cli import InputError
from support.later import when_used

with when_used():
    from scipy import signal
    import soundfile

SAMPLE_RATE = 16_000  # Hz; what speech models expect
FRAME = 400  # samples (25 ms), one analysis window; nothing shorter is a recording
SOUND_FILES = (".wav", ".flac", ".mp3", ".ogg")
# A flat top that went through MP3 or Ogg ripples by a percent and more around full scale.
FULL_SCALE = 0.99
# Our choice: speechocean762's utterances reach this share when raised 6 dB (median) above full scale; none has any.
CLIPPED = 0.01  # share of a channel's samples
LOWEST_RATE, HIGHEST_RATE = 4_000, 384_000  # Hz of a recording; no speech is below, no converter above
MOST_SAMPLES = 2**28  # of a recording, over all channels, and as resampled to 16 kHz: 4.7 hours
MISSING = 0.1  # s that an MP3 may have less than its header says; our choice, some encoders count their padding
UNKNOWN_SIZES = (0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF)  # of a WAV's sound, as SoX, others and ffmpeg write to a pipe


def read_audio(recording, lowest_rate=LOWEST_RATE, longest=math.inf, most_clipped=1.0):
    """A recording as mono float32 at 16 kHz: channels averaged, other rates resampled.

    recording: callable that returns the bytes of a sound file. Returns (S,) in [-1, 1].
    Raises InputError for what is missing, unreadable, cut off, empty, too large or longer than `longest` seconds,
    shorter than one frame, not finite, at full scale in more than `most_clipped` of a channel, or of a rate below
    `lowest_rate` in Hz: its upper band would be empty.
    """
    audio, rate = _decode(recording() or b"", lowest_rate, longest)  # (S, channels); the hub may have no bytes
    clipped = (np.abs(audio) >= FULL_SCALE).mean(axis=0).max() if most_clipped < 1 else 0.0
    if clipped > most_clipped:  # not after resampling, which rounds flat tops
        raise InputError(
            f"{clipped:.1%} of the samples are at full scale (limit {most_clipped:.0%}), so the sound "
            f"is distorted: record it again at a lower level"
        )
    with np.errstate(invalid="ignore", over="ignore"):  # said below
        audio = audio.mean(axis=1)  # (S,)
    if not np.isfinite(audio).all():
        raise InputError(f"recording has {np.sum(~np.isfinite(audio))} samples that are not finite")
    if rate != SAMPLE_RATE:
        common = math.gcd(rate, SAMPLE_RATE)
        audio = signal.resample_poly(audio, SAMPLE_RATE // common, rate // common).astype(np.float32)
    if len(audio) < FRAME:
        raise InputError(f"recording has {len(audio)} samples at 16 kHz, less than one frame of {FRAME}")
    return audio


def rate_of(recording):
    """Sampling rate in Hz of a recording that `read_audio` has read."""
    with soundfile.SoundFile(_Content(_with_length(recording()))) as file:
        return file.samplerate


def sound_files(folder):
    """The recordings in a folder and the folders in it, by name. Raises InputError when there are none."""
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SOUND_FILES and path.is_file())
    if not found:
        raise InputError(f"{folder} has no recordings ({', '.join(SOUND_FILES)}): give a folder with sound files")
    for path in found:
        if re.search("[\ud800-\udfff]", str(path)):  # so Python writes bytes that are not UTF-8
            raise InputError(f"{ascii(str(path))} is not UTF-8: rename it")
    return found


def read_sound_file(path, longest=math.inf, lowest_rate=LOWEST_RATE):
    """A sound file as `read_audio` gives it, (S,). longest: seconds.

    Raises InputError, naming the file, for what `read_audio` refuses, more than CLIPPED at full scale included.
    """
    content = files.read_bytes(path)
    try:
        return read_audio(lambda: content, lowest_rate, longest, CLIPPED)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _decode(content, lowest_rate, longest):
    """A sound file's bytes as float32 samples (S, channels), at least one, and their rate in Hz.

    Raises InputError for what is unreadable, cut off, empty, too large, longer than `longest` seconds, or of a rate
    below `lowest_rate`.
    """
    content = _with_length(content)
    try:
        with soundfile.SoundFile(_Content(content)) as file:
            rate, frames = file.samplerate, file.frames
            _check_header(rate, frames, file.channels, lowest_rate, longest)
            audio = file.read(dtype="float32", always_2d=True)  # (S, channels)
    except (soundfile.SoundFileError, ValueError, MemoryError) as error:
        reason = getattr(error, "error_string", "") or type(error).__name__
        raise InputError(f"not a readable sound file: {reason}") from error
    if not len(audio):
        raise InputError("recording is empty")
    if frames - len(audio) > rate * MISSING or content[:4] == b"OggS" and not _ogg_ends(content):
        raise InputError("recording is cut off: its end is missing; copy it again")
    return audio, rate


def _ogg_ends(content):
    """Whether the last page of an Ogg file says that it is the last one."""
    return bool(content[content.rfind(b"OggS") + 5] & 4)


class _Content(io.BytesIO):
    """A sound file's bytes; a damaged header may send libsndfile before its start, which would print a traceback."""

    def seek(self, offset, whence=io.SEEK_SET):
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


def _check_header(rate, frames, channels, lowest_rate, longest):
    """Raises InputError before anything is decoded: a header of a few bytes may ask for gigabytes."""
    if rate < lowest_rate:
        raise InputError(
            f"{rate:,} Hz is below {lowest_rate:,} Hz, so the upper band is missing: record it "
            f"again at a higher rate, or leave it out"
        )
    if frames / rate > longest:
        raise InputError(f"{frames / rate:.2f} s is longer than {longest} s: cut it into sentences")
    if rate > HIGHEST_RATE or frames * max(channels, 16_000 / rate) > MOST_SAMPLES:
        raise InputError(
            f"its header says {rate:,} Hz and {frames:,} x {channels} samples (limits {HIGHEST_RATE:,}"
            f", {MOST_SAMPLES:,}): cut it, or convert it again"
        )


def _with_length(content):
    """A WAV file with the length of its sound, which a program that writes to a pipe cannot know; others as they are.

    Raises InputError where less sound is there than the header says: libsndfile would read what is left of it.
    """
    order = {b"RIFF": "<", b"RIFX": ">"}.get(content[:4])
    start = 12  # of the first chunk: a name, a size, and content of an even length
    while order and start + 8 <= len(content):
        name, size = struct.unpack_from(order + "4sI", content, start)
        start += 8
        if name == b"data":
            left = len(content) - start
            (whole,) = struct.unpack_from(order + "I", content, 4)  # where this is known too, no sound is no sound
            if size in UNKNOWN_SIZES or size == 0 and whole + 8 <= start:
                return content[: start - 4] + struct.pack(order + "I", left) + content[start:]
            if size > left:
                raise InputError(
                    f"recording is cut off: its header says {size:,} bytes of sound, {left:,} are there; copy it again"
                )
            break
        start += size + size % 2
    return content
