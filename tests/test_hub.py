"""The default hub ids against a small hub on the loopback: fetched once, then used without a network."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_data import hub_table

import data
import model as models
from support import cli, hub

NOBODY = "http://127.0.0.1:9"  # nothing listens at this address
FIRST, SECOND = "1" * 40, "2" * 40  # commits that the moving revision names, one after the other


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks of a hub: the commit of a revision, the files of a commit, and their content."""

    def __init__(self, revisions, commits):
        super().__init__(("127.0.0.1", 0), Answer)
        self.revisions = revisions  # {(repository, revision): commit}
        self.commits = commits  # {(repository, commit): folder}
        self.seen = []  # requests, as "GET path"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).removeprefix("/")
        self.server.seen.append(f"{self.command} {path}")
        api = re.fullmatch(r"api/((?:models|datasets)/[^/]+/[^/]+)/(revision|tree)/(.+)", path)
        file = re.fullmatch(r"((?:datasets/)?[^/]+/[^/]+)/resolve/(\w+)/(.+)", path)
        if api:
            repository, what, revision = api.groups()
            repository = repository.removeprefix("models/")
            commit = self.server.revisions.get((repository, revision), revision)
            folder = self.server.commits.get((repository, commit))
            known = any(repository == name for name, _ in self.server.commits)
            if not folder:
                return self.reply(404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
            if what == "revision":
                return self.reply(200, {}, json.dumps({"id": repository, "sha": commit, "siblings": []}).encode())
            files = [
                {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": etag(path)}
                for path in folder.rglob("*")
                if path.is_file()
            ]
            return self.reply(200, {}, json.dumps(files).encode())
        if file:
            repository, commit, name = file.groups()
            path = self.server.commits.get((repository, commit), Path()) / name
            if not path.is_file():
                return self.reply(404, {"X-Error-Code": "EntryNotFound"})
            return self.reply(200, {"ETag": f'"{etag(path)}"', "X-Repo-Commit": commit}, path.read_bytes())
        self.reply(404, {})

    do_HEAD = do_POST = do_CONNECT = do_GET

    def reply(self, status, headers, content=b""):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": len(content)}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def etag(path):
    return hashlib.sha1(f"{path} {path.stat().st_size}".encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# One life of a machine: online, then with a moved revision, then offline


class Machine:
    """A folder, a cache of its own, and what scripts that run there ask of the hub."""

    def __init__(self, folder, server):
        self.folder, self.server = folder, server

    def run(self, *arguments, offline=False):
        """(exit code, output, requests) of python with these arguments."""
        environment = os.environ | {
            "HF_HOME": str(self.folder / "cache"),
            "HF_ENDPOINT": self.server.url,
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_DATASETS_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HTTPS_PROXY": self.server.url,  # so that the hub sees it when anything else is asked
            "NO_PROXY": "127.0.0.1",
        }
        self.server.seen.clear()
        result = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        return result.returncode, result.stdout + result.stderr, list(self.server.seen)

    def train(self, output, *more, **how):
        size = ["--limit", 4, "--rank", 4, "--batch-size", 4, "--accumulation", 1, "--epochs", 1]
        return self.run(ROOT / "train.py", *size, "--learning-rate", 1e-2, "--output", output, *more, **how)

    def evaluate(self, adapter, output, **how):
        size = ["--limit", 4, "--max-new-tokens", 20]
        return self.run(ROOT / "evaluate.py", "--adapter", adapter, "--output", output, *size, **how)

    def read(self, path):
        return (self.folder / path).read_bytes()


@pytest.fixture(scope="module")
def server(checkpoint, corpus, tmp_path_factory):
    """The tiny model and corpus under the names of the real ones, the model in two commits, among other files."""
    folder = tmp_path_factory.mktemp("hub")
    first, second = (shutil.copytree(checkpoint, folder / name) for name in ("first", "second"))
    for name in (
        "pytorch_model.bin",
        "speech-lora/adapter_model.bin",
        "modeling_phi4mm.py",
        "README.md",
        "vision-lora/adapter_config.json",
        "vision-lora/adapter_model.safetensors",
    ):
        (first / name).parent.mkdir(exist_ok=True)
        (first / name).write_bytes(b"of no use")
    weights = load_file(second / "model.safetensors")
    save_file({key: 2 * value for key, value in weights.items()}, second / "model.safetensors", {"format": "pt"})
    for split in ("train", "test"):
        hub_table(corpus, split).to_parquet(folder / "corpus" / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "large").mkdir()
    (folder / "large" / "config.json").write_text('{"model_type": "phi4_multimodal"}')
    with open(folder / "large" / "model-00001-of-00002.safetensors", "wb") as file:
        file.truncate(int(models.LARGEST_CPU_MODEL) + 1)  # a hole: it takes no room
    data_set = f"datasets/{data.HUB_CORPUS}"
    with Hub(
        {(models.HUB_MODEL, models.HUB_MODEL_REVISION): FIRST},
        {
            (models.HUB_MODEL, FIRST): first,
            (models.HUB_MODEL, SECOND): second,
            (data_set, data.HUB_CORPUS_REVISION): folder / "corpus",
            ("some/large-model", FIRST): folder / "large",
        },
    ) as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def life(server, tmp_path_factory):
    """{what was run: (exit code, output, requests)} with the default ids, and the machine."""
    machine = Machine(tmp_path_factory.mktemp("machine"), server)
    moving = models.HUB_MODEL, models.HUB_MODEL_REVISION
    happened = {"train": machine.train("online")}
    server.revisions[moving] = SECOND
    shutil.rmtree(machine.folder / "cache" / "datasets", ignore_errors=True)  # made of the Parquet files
    happened |= {
        "evaluate, moved": machine.evaluate("online", "scores"),
        "train, offline": machine.train("offline", offline=True),
        "evaluate, offline": machine.evaluate("offline", "scores-offline", offline=True),
        "resume, moved": machine.train("online", "--resume"),
    }
    server.revisions[moving] = FIRST
    return happened, machine


def test_the_default_ids_are_fetched_once_and_only_what_is_needed(life):
    code, text, requests = life[0]["train"]
    assert code == 0, text
    model = f"{models.HUB_MODEL}/resolve/{FIRST}"
    corpus = f"datasets/{data.HUB_CORPUS}/resolve/{data.HUB_CORPUS_REVISION}/data"
    files = [
        f"{model}/{name}"
        for name in (
            "config.json",
            "generation_config.json",
            "preprocessor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "model.safetensors",
            "speech-lora/adapter_config.json",
            "speech-lora/adapter_model.safetensors",
        )
    ] + [f"{corpus}/{split}-00000-of-00001.parquet" for split in ("train", "test")]
    assert sorted(requests) == sorted(
        [
            *2 * [f"GET api/models/{models.HUB_MODEL}/revision/{models.HUB_MODEL_REVISION}"],
            f"GET api/models/{models.HUB_MODEL}/tree/{FIRST}",
            f"GET api/datasets/{data.HUB_CORPUS}/revision/{data.HUB_CORPUS_REVISION}",
            f"GET api/datasets/{data.HUB_CORPUS}/tree/{data.HUB_CORPUS_REVISION}",
            *(f"{method} {file}" for file in files for method in ("HEAD", "GET")),
        ]
    )


def test_the_commit_is_recorded_and_the_name_stays_the_users(life):
    _, machine = life
    settings = json.loads(machine.read("online/epoch-1/settings.json"))
    assert (settings["model"], settings["revision"]) == (models.HUB_MODEL, FIRST)
    assert (settings["data"], settings["data_revision"]) == (data.HUB_CORPUS, data.HUB_CORPUS_REVISION)
    adapter = json.loads(machine.read("online/epoch-1/adapter_config.json"))
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (models.HUB_MODEL, FIRST)


def test_an_evaluation_asks_nothing_and_keeps_to_the_commit_when_the_revision_has_moved(life):
    code, text, requests = life[0]["evaluate, moved"]
    assert code == 0 and not requests, (text, requests)


def test_offline_everything_comes_from_the_cache_with_the_same_result(life):
    happened, machine = life
    for what in ("train, offline", "evaluate, offline"):
        code, text, requests = happened[what]
        assert code == 0 and not requests, (text, requests)
    for file in ("settings.json", "epoch-1/adapter_config.json"):
        online, offline = (machine.read(f"{run}/{file}") for run in ("online", "offline"))
        assert online.replace(b'"online"', b'"offline"') == offline
    assert machine.read("online/epoch-1/adapter_model.safetensors") == machine.read(
        "offline/epoch-1/adapter_model.safetensors"
    )
    assert machine.read("scores-offline/predictions.jsonl") == machine.read("scores/predictions.jsonl")


def test_a_run_is_not_resumed_on_a_model_that_has_moved(life):
    code, text, requests = life[0]["resume, moved"]
    error = text.splitlines()[-1]
    assert code == 2 and FIRST in error and SECOND in error, text
    assert not [request for request in requests if "safetensors" in request]


# ----------------------------------------------------------------------------------------------------------------------
# What is not to be had


@pytest.fixture
def reach(server, tmp_path, monkeypatch):
    """Lets this process reach a hub, with a cache of its own; called again: another hub, or none."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)

    def set_up(url=server.url, offline=False):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        server.seen.clear()
        return server

    return set_up


def test_without_a_gpu_a_model_of_the_hub_is_judged_by_its_size_before_any_of_it_is_fetched(reach):
    reach()
    assert models.check_model(models.HUB_MODEL, models.HUB_MODEL_REVISION) == FIRST
    for offline in (False, True):
        seen = reach(offline=offline).seen
        with pytest.raises(cli.InputError, match="some/large-model needs a CUDA GPU.*python tiny.py") as error:
            models.check_model("some/large-model", FIRST)
        assert "\n" not in str(error.value)
        assert bool(seen) != offline and not [request for request in seen if "safetensors" in request]


@pytest.mark.parametrize(
    "name, revision, how, reason",
    [
        (models.HUB_MODEL, models.HUB_MODEL_REVISION, {"offline": True}, "HF_HUB_OFFLINE"),
        (models.HUB_MODEL, models.HUB_MODEL_REVISION, {"url": NOBODY}, "refused"),
        (models.HUB_MODEL, FIRST, {"url": NOBODY}, "refused"),
        (models.HUB_MODEL, "refs/pr/71", {}, "no such revision"),
        ("nobody/nothing", "main", {}, "none of this name"),
        ("no/such/folder", "main", {}, "no/such/folder"),
    ],
)
def test_what_cannot_be_had_is_one_line_at_once_with_the_id_the_reason_and_the_remedy(
    reach, name, revision, how, reason
):
    reach(**how)
    started = time.monotonic()
    with pytest.raises(cli.InputError) as error:
        hub.fetch(name, revision, "model", ["config.json"])
    text = str(error.value)
    assert f"model {name} " in text and f"revision {revision} " in text and reason in text and "give a folder" in text
    assert "\n" not in text and time.monotonic() - started < 5


def test_without_a_network_the_cache_serves_a_revision_that_moves(reach):
    reach()
    fetched = hub.fetch(models.HUB_MODEL, models.HUB_MODEL_REVISION, "model", ["config.json"])
    for how in ({"url": NOBODY}, {"offline": True}):
        reach(**how)
        assert hub.fetch(models.HUB_MODEL, models.HUB_MODEL_REVISION, "model", ["config.json"]) == fetched
    assert fetched[1] == FIRST


def test_a_download_that_was_cut_short_is_refused_offline_and_completed_online(reach):
    files = models.HUB_MODEL, FIRST, "model"
    reach()
    hub.fetch(*files, ["config.json"])
    reach(offline=True)
    with pytest.raises(cli.InputError, match=f"{models.HUB_MODEL}.*not whole in the cache"):
        hub.fetch(*files, ["*.json"])
    reach()
    folder, _ = hub.fetch(*files, ["*.json"])
    reach(offline=True)
    assert hub.fetch(*files, ["*.json"]) == (folder, FIRST) and (folder / "tokenizer.json").is_file()


def test_what_a_folder_lacks_is_not_looked_for_at_the_hub(reach, checkpoint, new_model):
    server, model = reach(), new_model()
    shutil.copytree(checkpoint, "model", ignore=lambda *_: [models.SPEECH_ADAPTER])  # a name like a hub id's
    with pytest.raises(cli.InputError, match="model/speech-lora/adapter_config.json cannot be read"):
        models.load_base("model", None, "float32", "sdpa", "merge")
    with pytest.raises(cli.InputError, match="out/epoch-1/adapter_config.json cannot be read"):
        models.load_trained(model, "out/epoch-1", "lora")
    assert not server.seen
