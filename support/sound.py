"""Sound files: a corpus' are WAV or FLAC and read by libsndfile, a person's are whatever FFmpeg decodes.

FFmpeg runs in a process of its own for each recording, bounded in time, memory and what it may write, so no file takes
more than its own request with it. A corpus needs no FFmpeg. Every fault is one InputError.
"""

from collections.abc import Callable
import io
import math
import os
from pathlib import Path
import re
import shutil
import struct
import subprocess
import sys
import tempfile

import numpy as np

from support import files
from support.cli import InputError
from support.later import when_used

with when_used():
    from scipy import signal
    import soundfile

SAMPLE_RATE = 16_000  # Hz; what speech models expect
FRAME = 400  # samples (25 ms), one analysis window; nothing shorter is a recording
LOWEST_RATE, HIGHEST_RATE = 4_000, 384_000  # Hz of a recording; no speech is below, no converter above
MOST_SAMPLES = 2**28  # of a recording, over all channels, and as resampled to 16 kHz: 4.7 hours
CORPUS_FILES = (b"RIFF", b"RIFX", b"RF64", b"fLaC")  # how WAV and FLAC begin
ENCODINGS = re.compile("PCM_.*|FLOAT|DOUBLE|U?A?LAW")  # of a corpus' sound; others are lossy and hide their length
UNKNOWN_SIZE = 2**31 - 2**20  # bytes; WAV headers that programs write to a pipe say this or more

# The quietest utterance of speechocean762 has -47.5 dBFS; a muted microphone leaves its converter's noise.
SILENCE = -60.0  # dBFS, root mean square without the constant offset; our choice
PEAK = 16  # times full scale: floats may be a little above it, 16-bit numbers written as floats are far above
CANCELLED = 0.03  # of the loudest channel is left by averaging: no two microphones differ so exactly
# A flat top that went through MP3 or Ogg ripples by a percent and more around full scale.
FULL_SCALE = 0.99
# Our choice: speechocean762's utterances reach this share when raised 6 dB (median) above full scale; none has any.
CLIPPED = 0.01  # share of a channel's samples

SOUND_FILES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".mp4", ".webm")
FORMATS = "wav,w64,flac,mp3,ogg,mov,matroska"  # FFmpeg's names; none of them opens another file
DECODING = 20  # s; 30 s of speech take 0.1
MEMORY = 2**20  # KB of address space; most of it is FFmpeg's libraries
BYTES, BYTES_A_SECOND = 4 * MOST_SAMPLES, 2**21  # that FFmpeg may write; 48 kHz with ten channels
MISSING = 0.2  # s that may be there less than the container says: a film's sound and picture end apart


# ----------------------------------------------------------------------------------------------------------------------
# A corpus


def read_audio(recording: Callable[[], bytes], lowest_rate: int = LOWEST_RATE) -> np.ndarray:
    """A corpus' recording as mono float32 at 16 kHz: channels averaged, other rates resampled.

    recording: callable that returns the bytes of a WAV or FLAC file. Returns (S,), full scale is 1.
    Raises InputError for what is no such file, cut off, empty, too large, shorter than one frame, not finite, of 16-bit
    numbers as floats, of channels that cancel each other, or of a rate below `lowest_rate` in Hz: its upper band would
    be empty.
    """
    content = recording() or b""  # the hub may have no bytes
    if content[:4] not in CORPUS_FILES:
        raise InputError("not a readable sound file: a corpus is of WAV or FLAC")
    _check_whole(content)
    audio, rate = _decode(content, lowest_rate)
    return _mono(audio, rate)


def check_level(audio: np.ndarray) -> None:
    """Raises InputError where (S,) is silence, which a model would learn from, or score, as readily as speech."""
    if not np.ptp(audio):
        raise InputError(f"all its samples are {audio[0]:g}: there is no sound in it; record or export it again")
    level = 20 * math.log10(max(np.std(audio, dtype=np.float64), 1e-6))
    if level < SILENCE:
        raise InputError(
            f"level {level:.1f} dBFS is silence (limit {SILENCE:.0f} dBFS): check the microphone and record it again"
        )


def _check_whole(content):
    """Raises InputError where a WAV or Ogg ends early, of which libsndfile and FFmpeg say nothing."""
    if content[:4] == b"OggS":
        page = content[content.rfind(b"OggS") :]
        # 27 bytes, the last of them the number of its segments, a byte with the length of each, the segments
        if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
            raise InputError("recording is cut off: its last page is not whole; copy it again")
    order = {b"RIFF": "<", b"RF64": "<", b"RIFX": ">"}.get(content[:4])
    name, start = None, 12  # of the first chunk: a name, a size, and content of an even length
    while order and name != b"data" and start + 8 <= len(content):
        name, size = struct.unpack_from(order + "4sI", content, start)
        start += 8
        there = len(content) - start
        if content[:4] == b"RF64" and name == b"data" and len(content) >= 36:
            (size,) = struct.unpack_from("<Q", content, 28)  # its first chunk has the sizes that need 64 bits
        if name == b"data" and there < size < UNKNOWN_SIZE:
            raise InputError(f"recording is cut off: its header says {size:,} bytes of sound, {there:,} are there")
        start += size + size % 2


def _decode(content, lowest_rate):
    """WAV or FLAC as float32 samples (S, channels), at least one, and their rate in Hz."""
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate, frames, encoding = file.samplerate, file.frames, file.subtype
            if not ENCODINGS.fullmatch(encoding):
                raise InputError(f"its sound is encoded as {encoding}: convert it to 16-bit WAV")
            if rate < lowest_rate:
                raise InputError(f"{rate:,} Hz is below {lowest_rate:,} Hz, so the upper band is missing: leave it out")
            # before anything is decoded: a header of a few bytes may ask for gigabytes
            if rate > HIGHEST_RATE or frames * max(file.channels, SAMPLE_RATE / rate) > MOST_SAMPLES:
                said = f"{rate:,} Hz and {frames:,} x {file.channels} samples"
                raise InputError(f"its header says {said}, more than is read: cut it, or convert it again")
            audio = file.read(dtype="float32", always_2d=True)  # (S, channels)
    except (soundfile.SoundFileError, ValueError, MemoryError) as error:
        reason = getattr(error, "error_string", "") or type(error).__name__
        raise InputError(f"not a readable sound file: {reason}") from error
    if not len(audio):
        raise InputError("recording is empty")
    if len(audio) < frames:
        raise InputError(f"recording is cut off: {len(audio):,} of {frames:,} samples are there; copy it again")
    return audio, rate


def _mono(audio, rate):
    """(S, channels) of a rate as (S,) at 16 kHz."""
    with np.errstate(invalid="ignore", over="ignore"):  # said below
        mono = audio.mean(axis=1)
    if not np.isfinite(mono).all():
        raise InputError(f"recording has {np.sum(~np.isfinite(mono))} samples that are not finite")
    if (peak := np.abs(audio).max()) > PEAK:
        raise InputError(f"its samples reach {peak:,.0f}, and 1 is full scale: divide them, or write whole numbers")
    if mono.std() < CANCELLED * audio.std(axis=0).max():
        raise InputError(f"its {audio.shape[1]} channels cancel each other, one is the other upside down: keep one")
    if rate != SAMPLE_RATE:
        common = math.gcd(rate, SAMPLE_RATE)
        mono = signal.resample_poly(mono, SAMPLE_RATE // common, rate // common).astype(np.float32)
    if len(mono) < FRAME:
        raise InputError(f"recording has {len(mono)} samples at 16 kHz, less than one frame of {FRAME}")
    return mono


# ----------------------------------------------------------------------------------------------------------------------
# A person's recordings


def read_own(
    recording: bytes | str | os.PathLike, longest: float = math.inf, lowest_rate: int = LOWEST_RATE
) -> tuple[np.ndarray, int]:
    """(A person's recording as `read_audio` gives a corpus', the sampling rate of its file in Hz).

    recording: path, or content, of any sound file; longest: seconds. Raises InputError, naming the file, for what
    `read_audio` refuses, for what is longer, silent, or at full scale in more than CLIPPED of a channel, and where
    FFmpeg is not installed.
    """
    content = recording if isinstance(recording, bytes) else files.read_bytes(recording)
    try:
        return _read_own(content, longest, lowest_rate)
    except InputError as error:
        raise InputError(f"{'recording' if content is recording else recording}: {error}") from error


def _read_own(content, longest, lowest_rate):
    _check_whole(content)
    wave, stated = _run_ffmpeg(content, longest)
    audio, rate = _decode(wave, lowest_rate)
    seconds = len(audio) / rate
    if seconds > longest:
        raise InputError(f"it is longer than {longest:g} s: cut it into sentences")
    if seconds < stated - MISSING:
        raise InputError(f"recording is cut off: {seconds:.2f} of {stated:.2f} s are there; copy it again")
    mono = _mono(audio, rate)
    clipped = (np.abs(audio) >= FULL_SCALE).mean(axis=0).max()  # not after resampling, which rounds flat tops
    if clipped > CLIPPED:
        many = f"{clipped:.1%} of the samples are at full scale (limit {CLIPPED:.0%})"
        raise InputError(f"{many}, so the sound is distorted: record it again at a lower level")
    check_level(mono)
    return mono, rate


def _run_ffmpeg(content, longest):
    """(a WAV of float32 samples, the seconds that the container says, 0 where it does not)."""
    if not shutil.which("ffmpeg"):
        raise InputError("recordings of one's own are decoded by ffmpeg, which is not installed: install it")
    most = int(min(BYTES, (longest + 1) * BYTES_A_SECOND))
    script = (
        f"ulimit -v {MEMORY}; exec ffmpeg -nostdin -hide_banner -threads 1 -filter_threads 1 -protocol_whitelist file "
        f"-format_whitelist {FORMATS} -i /dev/stdin -map 0:a:0 -t {min(longest, 1e6) + 1} -fs {most} "
        f"-c:a pcm_f32le -f wav -"
    )
    linux = sys.platform == "linux"  # where memory can be a file
    # not a pipe: telephones write an M4A's table of contents at its end
    with os.fdopen(os.memfd_create("recording"), "w+b") if linux else tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        try:
            done = subprocess.run(["sh", "-c", script], stdin=file, capture_output=True, timeout=DECODING)
        except subprocess.TimeoutExpired as error:
            raise InputError(f"decoding it takes more than {DECODING} s: convert it to WAV") from error
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode:
        reason = said.splitlines()[-1].removeprefix("/dev/stdin: ") if said else f"ffmpeg ended with {done.returncode}"
        raise InputError(f"not a readable sound file: {reason}; give WAV, FLAC, MP3, Ogg, Opus, M4A or WebM")
    if len(done.stdout) >= most:
        raise InputError(f"it decodes to more than {most >> 20:,} MB: convert it to 16 kHz and mono")
    stated = re.search(r"^  Duration: (\d+):(\d+):([\d.]+)", said, re.MULTILINE)
    if not stated or "Estimating duration" in said:
        return done.stdout, 0.0
    hours, minutes, seconds = map(float, stated.groups())
    return done.stdout, 3600 * hours + 60 * minutes + seconds


def sound_files(folder: Path) -> list[Path]:
    """The recordings in a folder and the folders in it, by name. Raises InputError when there are none."""
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SOUND_FILES and path.is_file())
    if not found:
        raise InputError(f"{folder} has no recordings ({', '.join(SOUND_FILES)}): give a folder with sound files")
    for path in found:
        if re.search("[\ud800-\udfff]", str(path)):  # so Python writes bytes that are not UTF-8
            raise InputError(f"{ascii(str(path))} is not UTF-8: rename it")
    return found
