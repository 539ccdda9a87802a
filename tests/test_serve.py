"""The service over HTTP, on the loopback."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
import json
from pathlib import Path
import re
import signal
import socket
import sys
import threading
import time
from types import SimpleNamespace
from urllib.request import urlopen

from conftest import sound, tone
import numpy as np
from processes import Process
from pydantic import TypeAdapter
import pytest
import urllib3

from analysis import assessor, serve
import data
import prompts
from support.sound import read_audio

SENTENCE = "We call it"
LEXICON = {"WE": [("W", "IY")], "CALL": [("K", "AO", "L")], "IT": [("IH", "T")]}


def answered(questions):
    """Results with a mark of every kind, whatever was recorded; the distributions tell recordings apart."""
    output = json.dumps({"word_transcript": "WE <b>", "phoneme_transcript": "W IY K AA L AH"})
    questions = [replace(question, trimmed=(1.2, 0.0)) for question in questions]
    lengths = [question.utterance.samples / data.SAMPLE_RATE for question in questions]
    scores = [dict.fromkeys(prompts.SCORES, [0] * 6 + [1 - x / 100, x / 200, x / 200, 0, 0]) for x in lengths]
    return [assessor.result(question, how, output, False) for question, how in zip(questions, scores)]


@pytest.fixture(scope="module")
def assess():
    """In the place of an Assessor: no model, and all is speech."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assessor, "find_speech", lambda audio: [(0, len(audio))])
        yield SimpleNamespace(lexicons=[LEXICON], answer=answered)


@pytest.fixture(scope="module")
def utterances(corpus):
    return data.read_corpus(corpus, "test", limit=4)


@pytest.fixture(scope="module")
def recordings(utterances):
    return [utterance.recording() for utterance in utterances]


@pytest.fixture(scope="module")
def running(assess, utterances):
    """(port, serve.Service) of a service in this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    port, service = listener.getsockname()[1], serve.Service(assess)
    origins = [f"http://127.0.0.1:{port}", "https://scores.example"]
    server = serve.server(serve.application(service, origins, "It knows <few> words.", utterances[0]))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield port, service
    server.should_exit = True
    thread.join()


@pytest.fixture
def ask(running):
    return partial(post, running[0])


def post(port, recording, text=None, **headers):
    """(status, what the JSON says, headers) of an answer. recording: bytes are sent as a file."""
    fields = {"sound": ("a.wav", recording) if isinstance(recording, bytes) else recording, "text": text}
    fields = {name: value for name, value in fields.items() if value is not None}
    answer = urllib3.request("POST", f"http://127.0.0.1:{port}/assess", fields=fields, headers=headers, timeout=60)
    return answer.status, answer.json(), answer.headers


def wait(condition):
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


# ----------------------------------------------------------------------------------------------------------------------
# Answers


def test_requests_that_wait_are_answered_in_batches_each_with_its_own_result(
    running, ask, assess, recordings, monkeypatch
):
    batches, answer, go_on = [], assess.answer, threading.Event()

    def failing(questions):
        batches.append([question.text for question in questions])
        assert go_on.wait(60) and "it" not in batches[-1]
        return answer(questions)

    monkeypatch.setattr(assess, "answer", failing)
    expected = {(recordings[i], text): 200 for i in range(4) for text in (SENTENCE, None)}
    single = {pair: asdict(answer([assessor.ask(*pair, assess.lexicons)])[0]) for pair in expected}
    asked = [(recordings[0], None)] + 2 * [*expected, (b"no sound", None), (recordings[0], "it")]
    expected |= {(b"no sound", None): 422, (recordings[0], "it"): 500}
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = [threads.submit(ask, *asked[0])]
        wait(lambda: batches)
        answers += [threads.submit(ask, *pair) for pair in asked[1:]]
        wait(lambda: running[1].asked.qsize() == 18 and running[1].requests == 19)
        monkeypatch.setattr(serve, "WAITING", 19)
        status, refused, headers = ask(bytes(serve.LARGEST))
        assert status == 503 and "try again" in refused["error"] and int(headers["Retry-After"]) > 0
        go_on.set()
    for pair, (status, answered, _) in zip(asked, (future.result() for future in answers)):
        assert status == expected[pair]
        assert status != 200 or answered == json.loads(json.dumps(single[pair]))
    assert [*map(len, batches)][:2] == [1, assessor.BATCH]
    assert any("it" in batch and len(batch) > 1 for batch in batches)  # what it was asked with is asked again


def test_the_description_for_programs_has_the_schema_of_every_answer_it_names(running):
    described, health = (
        json.load(urlopen(f"http://127.0.0.1:{running[0]}/{name}")) for name in ("openapi.json", "health")
    )
    named = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described))
    assert {*named} == described["components"]["schemas"].keys() and {"Result", "Refusal", "Word"} <= {*named}
    assert health == {"version": assessor.VERSION, "requests": 0}


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "arguments, headers, status, message",
    [
        ((sound(tone(1.0)), "a" * 9_000), {}, 400, "Part exceeded"),
        ((bytes(3 * serve.LARGEST),), {}, 413, "more than 9,000,000"),
        (("text",), {}, 400, "the form's fields are"),
        ((None,), {"Content-Type": "application/json"}, 400, "not a form"),
        ((b"",), {"Origin": "http://evil.example"}, 403, "only a page of"),
        ((b"",), {"Origin": "null"}, 403, "only a page of"),
    ],
)
def test_a_request_that_cannot_be_used_is_told_why_in_one_line(ask, arguments, headers, status, message):
    found, answer, _ = ask(*arguments, **headers)
    assert found == status and message in answer["error"] and "\n" not in answer["error"]
    assert TypeAdapter(assessor.Refusal).validate_python(answer)


def test_its_own_page_may_ask_and_that_of_a_proxy_that_was_named(running, ask, recordings):
    for origin in (f"http://127.0.0.1:{running[0]}", "https://scores.example"):
        assert ask(recordings[0], Origin=origin)[0] == 200


def test_a_client_that_goes_away_or_is_slow_holds_nothing(running, ask, recordings, monkeypatch):
    monkeypatch.setattr(serve, "ARRIVING", 0.5)
    head = b"POST /assess HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\nContent-Type: multipart/form-data; boundary=x"
    begun = b'--x\r\nContent-Disposition: form-data; name="sound"; filename="a"\r\n\r\n' + bytes(5000)
    for slow in (False, True):
        with socket.create_connection(("127.0.0.1", running[0])) as client:
            client.sendall(head + b"\r\n\r\n" + begun)
            wait(lambda: running[1].requests)
            assert not slow or b"408" in client.recv(1000).splitlines()[0]
    wait(lambda: not running[1].requests)
    assert ask(recordings[0])[0] == 200


def test_a_head_without_an_end_and_connections_without_one_are_cut_off(running, ask, recordings, monkeypatch):
    monkeypatch.setattr(serve, "HEAD", 0.5)
    address = ("127.0.0.1", running[0])
    with socket.create_connection(address, timeout=5) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() < began + 5:
                client.sendall(b"G")  # of its second head, which never ends
                time.sleep(0.05)
        assert time.monotonic() > began + 0.4
    monkeypatch.setattr(serve, "CONNECTIONS", 2)
    clients = [socket.create_connection(address, timeout=5) for _ in range(4)]
    assert [client.recv(100)[:12] for client in clients[2:]] == [b"HTTP/1.1 503"] * 2
    time.sleep(0.6)
    assert ask(recordings[0])[0] == 200


def test_nothing_is_written_to_the_disk_or_the_log(ask, tmp_path, capfd, monkeypatch):
    content = sound(np.stack([tone(25.0, 44_100)] * 2, axis=1), 44_100)
    assert 8_000_000 < len(content) < serve.LARGEST
    if sys.platform == "linux":  # elsewhere FFmpeg reads a file without a name
        monkeypatch.setattr("tempfile.TemporaryFile", None)
    assert ask(content, SENTENCE)[0] == 200 and ask(content, "secret")[0] == 422
    assert list(tmp_path.iterdir()) == [] and "".join(capfd.readouterr()) == ""


# ----------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.slow
def test_it_says_its_address_answers_and_ends_with_ctrl_c(run, recordings, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    arguments = ["--adapter", run[0] / "out", "--port", 0, "--max-new-tokens", 5]
    by_default = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # not ignored, as by a fork server
    process = Process("analysis.serve", arguments, folder, prepare=by_default)
    process.wait_for_lines(process.output, 1)
    address, port = re.match(r"(http://127\.0\.0\.1:(\d+)/) ", process.text()).groups()
    assert post(int(port), recordings[0])[0] == 200
    assert b"synthetic words, and no human voice" in urlopen(address).read()
    process.signal(signal.SIGINT)
    code, text = process.wait()
    assert code == 130 and text.count("\n") == 1 and not list(folder.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# The page


def test_the_page_runs_its_own_script_alone_and_says_what_the_model_knows(running, utterances):
    with urlopen(f"http://127.0.0.1:{running[0]}/") as answer:
        page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and policy.count("'sha256-") == 2
    assert not re.search(r'https?://|innerHTML|style="|\bon\w+="', page) and "1000 * 30" in page
    assert "It knows &lt;few&gt; words." in page and f'data-text="{utterances[0].text}"' in page


@pytest.fixture
def page(running, chromium, tmp_path):
    """The page in Chromium, whose microphone hears three seconds of a tone."""
    file = tmp_path / "microphone.wav"
    file.write_bytes(sound(tone(3.0, 48_000), 48_000, subtype="PCM_16"))
    microphone = "use-fake-device-for-media-stream", "use-fake-ui-for-media-stream"
    browser = chromium(*microphone, f"use-file-for-fake-audio-capture={file}")
    browser.get(f"http://127.0.0.1:{running[0]}/")
    return browser


def texts(browser, selector):
    return [element.text for element in browser.find_elements("css selector", selector)]


@pytest.mark.slow
def test_the_keyboard_alone_records_and_the_answer_is_announced_and_plays(page, assess, monkeypatch):
    asked = []
    monkeypatch.setattr(assess, "answer", lambda questions: asked.extend(questions) or answered(questions))

    def press(keys):
        page.switch_to.active_element.send_keys(keys)
        return page.switch_to.active_element.get_attribute("id")

    page.switch_to.active_element.send_keys("\ue004")  # Tab
    press("\ue009a" + "\ue000" + SENTENCE)  # Control and A, in the place of the sentence that is there
    assert press("\ue004") == "record"
    press(" ")
    wait(lambda: texts(page, "#record") == ["Stop"])
    wait(lambda: texts(page, "#clock") == ["1 of 30 s"])
    assert 0.3 < float(page.find_element("id", "level").get_attribute("value")) < 0.7
    assert press(" ") == "record"
    wait(lambda: texts(page, "#words b"))
    assert page.switch_to.active_element.get_attribute("id") == "record"  # where the next try begins
    (state,) = page.find_elements("css selector", "[aria-live=polite]")
    assert state.text == "accuracy 6.0, fluency 6.0, prosodic 6.0, total 6.0, 2 of 3 words marked"

    heard = read_audio(asked[0].utterance.recording)
    assert asked[0].text == SENTENCE and 1.0 < len(heard) / data.SAMPLE_RATE < 5
    tones = np.abs(np.fft.rfft(heard))
    assert tones.argmax() * data.SAMPLE_RATE / len(heard) == pytest.approx(440, abs=2)  # the file's
    assert texts(page, "#words ol li") == ["W w", "IY i", "K k", "AO>AA ɔ>ɑ", "L l", "IH>AH ɪ>ʌ", "-T -t"]
    assert texts(page, "#words b") == ["WE", "CALL\nMispronunciation, 67 % right", "IT\nMispronunciation, 0 % right"]
    assert texts(page, "#scores figure b") == ["6.0"] * 4 and texts(page, "#heard")[0].startswith("WE <b>")
    assert texts(page, "#complete") == ["Completeness, the share of the words that were said: 100 %"]
    assert texts(page, "#trimmed") == ["Silence that was left out: 1.2 s before, 0.0 s after speech."]
    seconds = page.execute_script("return document.querySelector('audio').duration")
    assert seconds == pytest.approx(len(heard) / data.SAMPLE_RATE, abs=0.01)
    logged = [entry["message"] for entry in page.get_log("browser")]
    assert [line for line in logged if "deprecated" not in line] == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_has_no_fault_that_axe_finds(page, recordings, tmp_path, scheme):
    package = find_spec("axe_core_python")
    if not package:
        pytest.skip("axe-core-python is not installed")
    (tmp_path / "a.wav").write_bytes(recordings[0])
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    page.execute_script((Path(package.submodule_search_locations[0]) / "axe.min.js").read_text())
    for shown in (False, True):
        if shown:
            page.execute_script(f"document.getElementById('text').value = '{SENTENCE}'")
            page.find_element("id", "file").send_keys(str(tmp_path / "a.wav"))
            wait(lambda: texts(page, "#words b"))
        found = page.execute_async_script("axe.run().then(arguments[0], arguments[0])")
        assert [fault["nodes"] for fault in found["violations"]] == [] and len(found["passes"]) > 15
