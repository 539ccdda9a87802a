"""The service under load: 200 requests, 20 at a time, 20 of them hostile. Is one lost or wrong, does memory grow?

    pip install starlette uvicorn python-multipart pebble psutil
    python bench/serve.py --adapter out/ --pronunciations tiny/pronunciations.txt          # five minutes, Linux

Starts analysis.serve. Every answer is compared with that of an Assessor that is asked about one recording at a time:
numbers to 1e-5, as sums are rounded by a batch's shape, and all else exactly. Each run sends the same requests one at a
time, then 20 at a time; latencies are those of the recordings that can be answered. The clients have the same cores.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
import http.client
import io
import json
import os
from pathlib import Path
import random
import re
import signal
import socket
from statistics import median, quantiles
import subprocess
import sys
import time


# isort: split
import numpy as np
import psutil
import soundfile

from analysis import assessor
import data
from support import cli, sound

AT_A_TIME, HOSTILE = 20, 0.1  # requests; the share of them
CLOSE = 1e-5  # of a probability or score
BOUNDARY = "boundary-of-the-form"


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
    body: bytes
    headers: tuple = ()
    answer: str | None = None  # the result it must have, as JSON


def form(content, **fields):
    parts = {f'"{name}"': value.encode() for name, value in fields.items()} | {'"sound"; filename="a"': content}
    body = b"".join(
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; name={name}\r\n\r\n".encode() + value + b"\r\n"
        for name, value in parts.items()
    )
    return body + f"--{BOUNDARY}--\r\n".encode()


def encoded(audio, rate=data.SAMPLE_RATE, format="WAV"):
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=format, subtype="PCM_16")
    return file.getvalue()


def hostile(content, text):
    """A request of every kind that must not be answered with scores."""
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 31 * data.SAMPLE_RATE)
    bomb = encoded(np.zeros((20 * sound.HIGHEST_RATE, 8), np.int16), sound.HIGHEST_RATE, "FLAC")  # 0.25 GB of samples
    return [
        Request("no sound file", 422, form(noise.tobytes()[:100_000])),
        Request("cut off", 422, form(content[:-2000], text=text)),
        Request("small, but large when decoded", 422, form(bomb)),
        Request("longer than 30 s", 422, form(encoded(noise))),
        Request("silence", 422, form(encoded(np.zeros(data.SAMPLE_RATE)))),
        Request("a word that does not exist", 422, form(content, text="xqzzt")),
        Request("too large", 413, form(bytes(12_000_000))),
        Request("another form", 400, form(content, text=text, name="me")),
        Request("another page", 403, form(content, text=text), (("Origin", "http://evil.example"),)),
        Request("gone before the end", None, form(content, text=text)),
    ]


def make_requests(settings):
    """The requests of a run, in a random order, with the answers that are right."""
    ((_, training),) = runs.adapters(settings.adapter, None)
    bad = round(HOSTILE * settings.requests)
    utterances = data.read_corpus(training.data, "test", training.data_revision, settings.requests - bad)
    assess = assessor.Assessor(settings.adapter, settings.pronunciations)
    requests = []
    for number in range(settings.requests - bad):
        utterance = utterances[number % len(utterances)]
        answer = json.dumps(assess(utterance.recording(), utterance.text))
        body = form(utterance.recording(), text=utterance.text)
        requests.append(Request("recording", 200, body, answer=answer))
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
    environment = os.environ | {"PYTHONPATH": str(workload.BENCH.parent)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            if not (address := re.search(r":(\d+)/", process.stdout.readline())):
                raise cli.RunError("analysis.serve has not started; its own lines say why")
            yield psutil.Process(process.pid), int(address[1])
        finally:
            process.send_signal(signal.SIGINT)


def send(port, request):
    """(seconds until the answer, None or what is wrong with it)."""
    started = time.perf_counter()
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", **dict(request.headers)}
    if request.status is None:
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        with socket.create_connection(("127.0.0.1", port)) as client:
            half = request.body[: len(request.body) // 2]
            length = f"Content-Length: {len(request.body)}\r\n"
            client.sendall(f"POST /assess HTTP/1.1\r\nHost: localhost\r\n{length}{head}\r\n".encode() + half)
        return time.perf_counter() - started, None
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", "/assess", request.body, headers)
        answer = connection.getresponse()
        status, result = answer.status, json.loads(answer.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        return time.perf_counter() - started, f"lost: {request.kind}: {error!r}"
    seconds = time.perf_counter() - started
    right = status == request.status and (alike(result, json.loads(request.answer)) if request.answer else True)
    return seconds, None if right else f"wrong: {request.kind}: {status} {json.dumps(result):.200}"


def alike(first, second):
    if isinstance(first, float) and isinstance(second, float):
        return abs(first - second) <= CLOSE
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(alike(value, second[key]) for key, value in first.items())
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(alike, first, second))
    return first == second


def measure(port, requests, at_a_time):
    """Figures of the requests, `at_a_time` at a time."""
    started = time.perf_counter()
    with ThreadPoolExecutor(at_a_time) as threads:
        answers = list(threads.map(lambda request: send(port, request), requests))
    took = time.perf_counter() - started
    seconds = [s for (s, _), request in zip(answers, requests) if request.kind == "recording"]
    faults = [fault for _, fault in answers if fault]
    print("\n".join([f"{at_a_time} at a time: {len(requests) / took:.1f} requests a second", *faults]), flush=True)
    figures = {"rate": len(requests) / took, "median": median(seconds), "late": quantiles(seconds, n=20)[-1]}
    return figures | {name: sum(fault.startswith(name) for fault in faults) for name in ("lost", "wrong")}


def held(process):
    """MB of the service, and of the processes that it started."""
    return [round(sum(p.memory_info().rss for p in some) / 1e6) for some in ([process], process.children(True))]


def main():
    settings = cli.parse(Settings, __doc__)
    requests = make_requests(settings)
    figures, memory = {"1": [], str(AT_A_TIME): []}, []
    with service(settings) as (process, port):
        measure(port, requests, AT_A_TIME)  # to warm up
        memory.append(held(process))
        for _ in range(settings.runs):
            for at_a_time, found in figures.items():
                found.append(measure(port, requests, int(at_a_time)))
            memory.append(held(process))
            print("MB of the service, of its processes: ", *memory[-1])
    kinds = sorted({request.kind for request in requests} - {"recording"})
    result = {"model": "trained", "requests": len(requests), "hostile": round(HOSTILE * len(requests)), "kinds": kinds}
    load = [round(value, 1) for value in os.getloadavg()]
    workload.write_result("serve-trained", result | {"load": load, "figures": figures, "memory_mb": memory})


if __name__ == "__main__":
    cli.run_script("serve.py", main)
