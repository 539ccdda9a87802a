"""A tiny model with barely trained weights and a small corpus, in the real formats, made once for all tests."""

import fcntl
import io
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same numbers on every machine
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
os.environ["HF_DATASETS_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # what processes.py starts finds the project from any folder

import numpy as np
import pytest
import soundfile
import torch

import data
import model as models
from support import cli, pretrained
import tiny
import train

torch.set_num_threads(1)  # tests run in several processes; the same numbers on every machine


# What train.py writes into settings.json of an epoch, as far as anything reads it
TRAINED = {"epoch": 1, "strategy": "lora", "speech_adapter": "merge", "model": "model", "data": "corpus"}
TRAINED |= {"revision": None, "data_revision": None, "dtype": "float32", "attention": "sdpa", "quantize": None}


def script(*arguments, cwd, environment=None):
    """Run python with these arguments, as a user would."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | (environment or {}), capture_output=True, text=True)


def call(monkeypatch, command, *arguments):
    """A command's main function, called in this process."""
    monkeypatch.setattr("sys.argv", [command.__name__, *map(str, arguments)])
    command.main()


def read_lines(path):
    """A file with a JSON object in every line, such as log.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def tone(seconds, rate=data.SAMPLE_RATE, frequency=440.0, amplitude=0.5):
    """A sine, (S,) in float32."""
    time = np.arange(round(seconds * rate)) / rate
    return (amplitude * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


def sound(wave, rate=data.SAMPLE_RATE, format="WAV", subtype=None):
    """The bytes of a sound file; a WAV of 32-bit floats where nothing else is said."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=format, subtype=subtype or ("FLOAT" if format == "WAV" else None))
    return file.getvalue()


def fifo(path):
    """A file that whoever opens it would wait for."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


class Payload:
    """Unpickling this makes a file: what comes from elsewhere could as well do anything else."""

    def __reduce__(self):
        return Path.touch, (Path("executed").absolute(),)


def copy_of(folder, tmp_path):
    """A copy of a checkpoint or a corpus that a test may spoil."""
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    """What a test writes to a relative path, such as out/, is its own."""
    monkeypatch.chdir(tmp_path)


def greedy(model, utterances, task, max_new_tokens):
    """Greedy answers, as model.generate gives them."""
    questions = [models.question(model, utterance, task) for utterance in utterances]
    return models.generate(model, questions, model.hear(utterances), max_new_tokens)


def made_once(tmp_path_factory, name, make):
    """A folder that the first of pytest-xdist's processes makes, and all of them read."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / name).exists():
            (root / f"{name}.unfinished").mkdir()
            make(root / f"{name}.unfinished")
            (root / f"{name}.unfinished").rename(root / name)
    return root / name


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    speakers = {"train": 4, "test": 2}
    return made_once(tmp_path_factory, "corpus", lambda root: tiny.write_corpus(root, speakers, per_speaker=10, seed=0))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    size = {"steps": 30, "seed": 0, "clips": 64}
    return made_once(tmp_path_factory, "checkpoint", lambda folder: tiny.write_model(folder, **size))


@pytest.fixture(scope="session")
def utterances(corpus):
    return data.read_corpus(corpus, "train")


@pytest.fixture
def new_model(checkpoint):
    """Makes a model as train.py does: speech adapter merged, fresh LoRA without dropout, chosen groups trainable."""

    def make(strategy="lora", speech_adapter="merge", rank=4, dtype="float32", quantize=None):
        model = models.load_base(pretrained.find(checkpoint), dtype, "sdpa", speech_adapter, quantize)
        models.add_adapter(model, rank, 2 * rank, dropout=0.0)
        models.set_trainable(model, strategy)
        return model

    return make


@pytest.fixture(scope="session")
def examples(checkpoint, utterances):
    model = models.load_base(pretrained.find(checkpoint), "float32", "sdpa", "none")
    return data.make_examples(utterances, model.tokenizer, model.audio_id)


def settings(patch, *arguments):
    """Settings of train.py, as its main function takes them from the command line."""
    patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    chosen = train.resumed(cli.parse(train.Settings, train.__doc__))
    train.check(chosen)
    train.resolve(chosen)
    return chosen


@pytest.fixture(scope="session")
def where(checkpoint, corpus):
    """Arguments that name the tiny model and corpus."""
    return ["--model", checkpoint, "--data", corpus]


@pytest.fixture(scope="session")
def short_run(where):
    """Trains two epochs of two steps into out/, in this process, with a checkpoint after each step."""
    sizes = "--limit 8 --epochs 2 --batch-size 4 --accumulation 2 --learning-rate 3e-3 --save-minutes 1e-6".split()

    def start(patch, *arguments):
        rank = [] if "continue" in arguments else ["--rank", 4, "--alpha", 8]
        train.train(settings(patch, *where, *sizes, *rank, *arguments))

    return start


@pytest.fixture(scope="session")
def run(where, tmp_path_factory):
    """A finished run of train.py, as a user starts it: the folder it was started in, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    sizes = "--limit 10 --epochs 2 --rank 4 --alpha 8 --batch-size 4 --accumulation 2 --learning-rate 1e-2".split()
    result = script(ROOT / "train.py", *where, *sizes, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result


@pytest.fixture
def chromium(tmp_path):
    """Starts Chromium with further flags; a test is skipped where that, its driver or selenium is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and chromedriver):
        pytest.skip("chromium and chromedriver are not installed")
    drivers = []

    def start(*flags):
        options = webdriver.ChromeOptions()
        options.binary_location = program
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        quiet = "no-first-run disable-background-networking disable-component-update disable-sync disable-quic"
        own = ["headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", *quiet.split()]
        for flag in (*own, f"user-data-dir={tmp_path / 'profile'}", *flags):
            options.add_argument(f"--{flag}")
        drivers.append(webdriver.Chrome(options, webdriver.ChromeService(chromedriver)))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.quit()
