"""Sound files: decoded only where the header can be believed.

Its few bytes may ask for gigabytes, say more than the file has, or lead libsndfile astray. Every fault is one
InputError.
"""

import io
import struct

from support.cli import InputError

LOWEST_RATE, HIGHEST_RATE = 4_000, 384_000  # Hz of a recording; no speech is below, no converter above
MOST_SAMPLES = 2**28  # of a recording, over all channels, and as resampled to 16 kHz: 4.7 hours
UNKNOWN_SIZES = (0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF)  # of a WAV's sound, as SoX, others and ffmpeg write to a pipe


def decode(content, lowest_rate, longest):
    """A sound file's bytes as float32 samples (S, channels), at least one, and their rate in Hz.

    Raises InputError for what is unreadable, cut off, empty, too large, longer than `longest` seconds, or of a rate
    below `lowest_rate`.
    """
    import soundfile

    content = _with_length(content)
    try:
        with soundfile.SoundFile(_Content(content)) as file:
            rate = file.samplerate
            _check_header(rate, file.frames, file.channels, lowest_rate, longest)
            audio = file.read(dtype="float32", always_2d=True)  # (S, channels)
    except (soundfile.SoundFileError, ValueError, MemoryError) as error:
        reason = getattr(error, "error_string", "") or type(error).__name__
        raise InputError(f"not a readable sound file: {reason}") from error
    if not len(audio):
        raise InputError("recording is empty")
    return audio, rate


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
