"""The service under load: 200 requests, 20 at a time, 20 of them hostile. Is one lost or wrong, does memory grow?

    pip install starlette uvicorn python-multipart psutil urllib3
    python -m bench.serve --adapter out/ --pronunciations tiny/pronunciations.txt          # five minutes, Linux

Every answer is compared with that of an Assessor that is asked about one recording at a time: numbers to 1e-5, as sums
are rounded by a batch's shape, and all else exactly. Each run sends the same requests one at a time, then 20 at a time;
latencies are those of the recordings that can be answered. The clients have the same cores.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
import io
import json
from pathlib import Path
import random
import re
import signal
from statistics import median, quantiles
import subprocess
import sys
import time

import numpy as np
import psutil
import soundfile
import urllib3

from analysis import assessor
import data
from support import cli, sound
from support import run as runs

AT_A_TIME, HOSTILE = 20, 0.1  # requests; the share of them
CLOSE = 1e-5  # of a probability or score
GONE = 0.02  # s until a client hangs up


@dataclass(kw_only=True)
class Settings:
    adapter: Path  # run folder of train.py, or one of its epoch-N folders
    pronunciations: tuple[Path, ...] = ()  # as of analysis.serve
    requests: cli.Count = 200
    runs: cli.Count = 3


@dataclass(frozen=True)
class Request:
    kind: str  # "recording", or of `hostile`
    status: int | None  # that the answer must have; None: nobody waits for it
    sound: bytes
    fields: dict = field(default_factory=dict)
    origin: dict = field(default_factory=dict)
    answer: str | None = None  # the result it must have, as JSON


def encoded(audio, rate=data.SAMPLE_RATE, format="WAV"):
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=format, subtype="PCM_16")
    return file.getvalue()


def hostile(content, text):
    """A request of every kind that must not be answered with scores."""
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 31 * data.SAMPLE_RATE)
    bomb = encoded(np.zeros((20 * sound.HIGHEST_RATE, 8), np.int16), sound.HIGHEST_RATE, "FLAC")  # 0.25 GB of samples
    return [
        Request("no sound file", 422, noise.tobytes()[:100_000]),
        Request("cut off", 422, content[:-2000], {"text": text}),
        Request("small, but large when decoded", 422, bomb),
        Request("longer than 30 s", 422, encoded(noise)),
        Request("silence", 422, encoded(np.zeros(data.SAMPLE_RATE))),
        Request("a word that does not exist", 422, content, {"text": "xqzzt"}),
        Request("too large", 413, bytes(12_000_000)),
        Request("another form", 400, content, {"text": text, "name": "me"}),
        Request("another page", 403, content, {"text": text}, {"Origin": "http://evil.example"}),
        Request("gone before the end", None, content, {"text": text}),
    ]


def make_requests(settings):
    """The requests of a run, in a random order, with the answers that are right."""
    ((_, training),) = runs.adapters(settings.adapter, None)
    bad = round(HOSTILE * settings.requests)
    corpus, _ = data.find_corpus(training.data, training.data_revision)
    utterances = data.read_corpus(corpus, "test", settings.requests - bad)
    assess = assessor.Assessor(settings.adapter, settings.pronunciations)
    requests = []
    for number in range(settings.requests - bad):
        utterance = utterances[number % len(utterances)]
        content, text = utterance.recording(), utterance.text
        answer = json.dumps(asdict(assess(content, text)))
        requests.append(Request("recording", 200, content, {"text": text}, answer=answer))
    kinds = hostile(utterances[0].recording(), utterances[0].text)
    requests += [kinds[number % len(kinds)] for number in range(bad)]
    random.Random(0).shuffle(requests)
    return requests


@contextmanager
def service(settings):
    """Yields the process of analysis.serve, and its port."""
    arguments = ["--adapter", settings.adapter, "--port", 0]
    if settings.pronunciations:
        arguments += ["--pronunciations", *settings.pronunciations]
    command = [sys.executable, "-m", "analysis.serve", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if not (address := re.search(r":(\d+)/", process.stdout.readline())):
                raise cli.RunError("analysis.serve has not started; its own lines say why")
            yield psutil.Process(process.pid), int(address[1])
        finally:
            process.send_signal(signal.SIGINT)


def send(port, request):
    """(seconds until the answer, None or what is wrong with it)."""
    started, url = time.perf_counter(), f"http://127.0.0.1:{port}/assess"
    how = {"headers": request.origin, "timeout": 120 if request.status else GONE, "retries": False}
    try:
        answer = urllib3.request("POST", url, fields={"sound": ("a", request.sound), **request.fields}, **how)
        result = answer.json()
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        return time.perf_counter() - started, f"lost: {request.kind}: {error!r}" if request.status else None
    seconds = time.perf_counter() - started
    if answer.status == request.status and (not request.answer or alike(result, json.loads(request.answer))):
        return seconds, None
    return seconds, f"wrong: {request.kind}: {answer.status} {json.dumps(result):.200}"


def alike(first, second):
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(alike(value, second[key]) for key, value in first.items())
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(alike, first, second))
    return abs(first - second) <= CLOSE if isinstance(first, float) and isinstance(second, float) else first == second


def measure(port, requests, at_a_time):
    """Figures of the requests, `at_a_time` at a time, as texts."""
    started = time.perf_counter()
    with ThreadPoolExecutor(at_a_time) as threads:
        answers = list(threads.map(lambda request: send(port, request), requests))
    took = time.perf_counter() - started
    seconds = [s for (s, _), request in zip(answers, requests) if request.kind == "recording"]
    faults = [fault for _, fault in answers if fault]
    cli.say(*faults)
    counts = [str(sum(fault.startswith(name) for fault in faults)) for name in ("lost", "wrong")]
    return [f"{len(requests) / took:.1f}", f"{median(seconds):.2f}", f"{quantiles(seconds, n=20)[-1]:.2f}", *counts]


def main():
    settings = cli.parse(Settings, __doc__)
    requests = make_requests(settings)
    rows = []
    with service(settings) as (process, port):
        measure(port, requests, AT_A_TIME)  # to warm up
        for run in range(settings.runs):
            for at_a_time in (1, AT_A_TIME):
                figures = measure(port, requests, at_a_time)
                memory = sum(one.memory_info().rss for one in [process, *process.children(True)])
                rows.append((f"run {run + 1}, {at_a_time} at a time", [*figures, f"{memory / 1e6:,.0f}"]))
    columns = ["requests a second", "median s", "95% s", "lost", "wrong", "MB of memory"]
    cli.show_table(f"{len(requests)} requests, {HOSTILE:.0%} of them hostile", columns, rows)


if __name__ == "__main__":
    cli.run_script("bench.serve", main)
