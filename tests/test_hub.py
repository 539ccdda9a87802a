"""The default hub ids against a small hub on the loopback: fetched once, then used without a network."""

import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import re
import shutil
import threading
from urllib.parse import unquote, urlsplit

from conftest import ROOT, script
from huggingface_hub import constants
import pytest
from safetensors.torch import load_file, save_file
from test_data import hub_table

import data
import model as models
from support import cli, files, pretrained
from support import run as runs

MODEL, REVISION = runs.HUB_MODEL, runs.HUB_MODEL_REVISION
CORPUS = f"datasets/{data.HUB_CORPUS}"
NOBODY = "http://127.0.0.1:9"  # nothing listens at this address
FIRST, SECOND = "1" * 40, "2" * 40  # commits that the moving revision names, one after the other


class Answer(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub: the commit of a revision, the files of a commit, and their content.

    A test that asks for anything else fails: the connection ends.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path).removeprefix("/")
        hub.seen.append(f"{self.command} {path}")
        asked = re.fullmatch(r"api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)/(revision|tree)/(.+)", path)
        if asked:
            repository, what, revision = asked.groups()
            commit = hub.revisions.get((repository, revision), revision)
            folder = hub.commits[repository, commit]
            answer = {"id": repository, "sha": commit, "siblings": []}
            if what == "tree":
                sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
                named = {path: {"type": "file", "path": str(path.relative_to(folder))} for path in sizes}
                answer = [named[path] | {"size": size, "oid": tag(path)} for path, size in sizes.items()]
            return self.reply(json.dumps(answer).encode(), {})
        repository, _, rest = path.partition("/resolve/")
        commit, _, name = rest.partition("/")
        file = hub.commits[repository, commit] / name
        self.reply(file.read_bytes(), {"ETag": f'"{tag(file)}"', "X-Repo-Commit": commit})

    do_HEAD = do_POST = do_CONNECT = do_GET

    def reply(self, content, headers):
        self.send_response(200)
        for key, value in (headers | {"Content-Length": len(content)}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def tag(path):
    return hashlib.sha1(f"{path} {path.stat().st_size}".encode()).hexdigest()


JSON = ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SPEECH = ["speech-lora/adapter_config.json", "speech-lora/adapter_model.safetensors"]
NEEDED = [*JSON, pretrained.WEIGHTS_INDEX, *SHARDS, *SPEECH]
NEEDLESS = "pytorch_model.bin speech-lora/adapter_model.bin modeling_phi4mm.py vision-lora/adapter_config.json".split()
NEEDLESS += [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]  # of main, beside a pull request's own


@pytest.fixture(scope="module")
def server(checkpoint, corpus, tmp_path_factory):
    """The tiny model, in two shards, and the tiny corpus under the names of the real ones, among other files."""
    folder = tmp_path_factory.mktemp("hub")
    first = shutil.copytree(checkpoint, folder / "first")
    weights = load_file(first / "model.safetensors")
    shard_of = {name: SHARDS[number % 2] for number, name in enumerate(weights)}
    for shard in SHARDS:
        save_file({name: weights[name] for name in weights if shard_of[name] == shard}, first / shard, {"format": "pt"})
    (first / pretrained.WEIGHTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    (first / "model.safetensors").unlink()
    (first / "vision-lora").mkdir()
    for name in NEEDLESS:
        (first / name).write_bytes(b"of no use")
    for split in ("train", "test"):
        hub_table(corpus, split).to_parquet(folder / "corpus" / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "large").mkdir()
    (folder / "large" / "config.json").write_text('{"model_type": "phi4_multimodal"}')
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.revisions = {(MODEL, REVISION): FIRST}  # {(repository, revision): commit}
        server.commits = {(MODEL, FIRST): first, ("some/large", FIRST): folder / "large"}
        server.commits[CORPUS, data.HUB_CORPUS_REVISION] = folder / "corpus"
        server.seen, server.url = [], f"http://127.0.0.1:{server.server_port}"  # requests, as "GET path"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.slow
def test_default_ids_are_fetched_once_recorded_and_not_asked_for_when_they_moved(server, tmp_path, monkeypatch):
    def requests_of(*arguments):
        environment = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        environment |= {"HTTPS_PROXY": server.url, "NO_PROXY": "127.0.0.1"}  # so that the hub sees whatever is asked
        server.seen.clear()
        result = script(*arguments, cwd=tmp_path, environment=environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return sorted(server.seen)

    size = "--limit 4 --rank 4 --batch-size 4 --accumulation 1 --epochs 1 --learning-rate 1e-2".split()
    needed = [f"{MODEL}/resolve/{FIRST}/{name}" for name in NEEDED]
    parts = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "test")]
    needed += [f"{CORPUS}/resolve/{data.HUB_CORPUS_REVISION}/{name}" for name in parts]
    asked = [f"GET api/models/{MODEL}/revision/{REVISION}", f"GET api/models/{MODEL}/tree/{FIRST}"]
    asked += [f"GET api/{CORPUS}/tree/{data.HUB_CORPUS_REVISION}"]
    asked += [f"{way} {file}" for file in needed for way in ("HEAD", "GET")]
    assert requests_of(ROOT / "train.py", *size, "--output", "online") == sorted(asked)
    settings, adapter = (
        files.read_json(tmp_path / "online" / "epoch-1" / f"{name}.json", dict)
        for name in ("settings", "adapter_config")
    )
    assert (settings["model"], settings["revision"]) == (MODEL, FIRST)
    assert (settings["data"], settings["data_revision"]) == (data.HUB_CORPUS, data.HUB_CORPUS_REVISION)
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (MODEL, FIRST)
    monkeypatch.setitem(server.revisions, (MODEL, REVISION), SECOND)
    shutil.rmtree(tmp_path / "cache" / "datasets", ignore_errors=True)  # made of the Parquet files
    assert not requests_of(ROOT / "evaluate.py", "--adapter", "online", "--limit", 4, "--max-new-tokens", 20)


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


def test_without_a_gpu_a_large_model_is_refused_before_it_is_fetched(reach):
    reach()
    assert pretrained.find(MODEL, REVISION).commit == FIRST
    for offline in (False, True):
        seen = reach(offline=offline).seen
        with pytest.raises(cli.InputError, match="^some/large needs a CUDA GPU.*tiny.py.*$"):
            pretrained.find("some/large", FIRST)
        assert bool(seen) != offline and not [request for request in seen if "safetensors" in request]


def test_what_cannot_be_had_is_one_line_with_id_reason_and_remedy(reach):
    for how, reason in (({"offline": True}, "HF_HUB_OFFLINE"), ({"url": NOBODY}, "refused")):
        reach(**how)
        with pytest.raises(cli.InputError, match=f"^(?=.*{MODEL} )(?=.*{REVISION} )(?=.*{reason}).*give a folder.*$"):
            files.fetch(MODEL, REVISION, "model", ["config.json"])


def test_without_a_network_the_cache_serves_a_revision_that_moves(reach):
    reach()
    fetched = files.fetch(MODEL, REVISION, "model", ["config.json"])
    assert fetched[1] == FIRST
    for how in ({"url": NOBODY}, {"offline": True}):
        reach(**how)
        assert files.fetch(MODEL, REVISION, "model", ["config.json"]) == fetched


def test_what_a_folder_lacks_is_not_looked_for_at_the_hub(reach, checkpoint):
    server = reach()
    shutil.copytree(checkpoint, "model", ignore=lambda *_: [pretrained.SPEECH_ADAPTER])  # a name like a hub id's
    with pytest.raises(cli.InputError, match="model/speech-lora/adapter_config.json cannot be loaded"):
        models.load_base(pretrained.find("model"), "float32", "sdpa", "merge")
    assert not server.seen
