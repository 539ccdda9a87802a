"""The service over HTTP, on the loopback."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

from conftest import sound, tone
import numpy as np
from pydantic import TypeAdapter
import pytest

from analysis import assessor, serve
import data
import prompts
from support import cli
from support.sound import read_audio

SENTENCE = "we see it"


@pytest.fixture(scope="module")
def assess(run, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("assess"))
        patch.setattr(assessor, "find_speech", lambda audio: [(0, len(audio))])  # tones are none
        yield assessor.Assessor(run[0] / "out", max_new_tokens=20)


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
    return lambda *arguments, **more: post(running[0], form(*arguments), **more)


def form(recording=None, text=None, **others):
    """A body of multipart/form-data; a value in bytes becomes a file."""
    body = b""
    for name, value in ({"sound": recording, "text": text} | others).items():
        if value is not None:
            file = '; filename="a.wav"' if isinstance(value, bytes) else ""
            value = value if isinstance(value, bytes) else value.encode()
            body += f'--x\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + value + b"\r\n"
    return body + b"--x--\r\n"


def post(port, body, path="/assess", method="POST", **headers):
    """(status, what the JSON says, headers) of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, {"Content-Type": "multipart/form-data; boundary=x"} | headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read()), answer.headers


def alike(first, second):
    """Whether two results are the same, numbers to 1e-5: so far sums depend on the shape of a batch."""
    if isinstance(first, float):
        return first == pytest.approx(second, abs=1e-5)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(alike(value, second[key]) for key, value in first.items())
    if isinstance(first, list):
        return len(first) == len(second) and all(map(alike, first, second))
    return first == second


def lasted(client):
    """Seconds until the service ends a connection that sends a letter of a head now and then."""
    began = time.monotonic()
    client.settimeout(0.1)
    while time.monotonic() < began + 10:
        try:
            client.sendall(b"G")
            if not client.recv(1):
                break
        except TimeoutError:
            pass
        except OSError:
            break
    return time.monotonic() - began


# ----------------------------------------------------------------------------------------------------------------------
# Answers


def test_many_requests_at_once_get_the_answers_of_single_ones(ask, assess, recordings, monkeypatch):
    sizes, answer = [], assess.answer
    monkeypatch.setattr(assess, "answer", lambda questions: sizes.append(len(questions)) or answer(questions))
    asked = [(b"no sound", None) if i % 7 == 3 else (recordings[i % 4], [SENTENCE, None][i % 2]) for i in range(24)]
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda pair: ask(*pair), asked))
    single = {pair: answer([assessor.ask(*pair, assess.lexicons)])[0] for pair in set(asked) if pair[0] != b"no sound"}
    for pair, (status, answered, _) in zip(asked, answers):
        assert status == 422 and "not a readable" in answered["error"] if pair not in single else status == 200
        assert pair not in single or alike(answered, json.loads(json.dumps(asdict(single[pair]))))
    assert max(sizes) > 1 and max(sizes) <= assessor.BATCH and sum(sizes) == sum(pair in single for pair in asked)


def test_a_recording_that_the_model_fails_on_loses_no_other(running, ask, assess, recordings, monkeypatch):
    started, go_on, answer = threading.Event(), threading.Event(), assess.answer

    def failing(questions):
        started.set()
        go_on.wait(60)
        if any(question.text == "it" for question in questions):
            raise RuntimeError("no memory")
        return answer(questions)

    monkeypatch.setattr(assess, "answer", failing)
    with ThreadPoolExecutor(5) as threads:
        answers = [threads.submit(ask, recordings[0])]
        assert started.wait(60)
        answers += [threads.submit(ask, recordings[0], text) for text in ("it", SENTENCE, SENTENCE, SENTENCE)]
        while running[1].asked.qsize() < 4:  # they go to the model together
            time.sleep(0.01)
        go_on.set()
        answers = [future.result() for future in answers]
    assert [status for status, _, _ in answers] == [200, 500, 200, 200, 200]
    assert answers[1][1]["error"] == "the service failed: its log says why" and running[1].requests == 0


def test_a_decoder_that_is_killed_costs_its_own_request_alone(ask, recordings, monkeypatch, tmp_path):
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert ask(recordings[0])[0] == 422
    assert ask(recordings[0])[0] == 200


def test_the_description_for_programs_is_that_of_the_typed_result(running):
    connection = http.client.HTTPConnection("127.0.0.1", running[0])
    connection.request("GET", "/openapi.json")
    described = json.loads(connection.getresponse().read())
    schemas = {}
    for kind in (assessor.Result, assessor.Refusal):
        schema = TypeAdapter(kind).json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {}) | {kind.__name__: schema}

    def untitled(value):
        if isinstance(value, dict):
            return {key: untitled(part) for key, part in value.items() if key != "title"}
        return [*map(untitled, value)] if isinstance(value, list) else value

    assert described["components"]["schemas"] == untitled(schemas)
    assert post(running[0], None, "/health", "GET")[1].keys() == {"version", "requests"}


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "arguments, how, status, message",
    [
        ({"recording": b"RIFF but no more"}, {}, 422, "recording: not a readable sound file"),
        ({"recording": sound(tone(31.0))}, {}, 422, "longer than 30 s"),
        ({"recording": sound(tone(1.0)), "text": "xqzzt"}, {}, 422, "XQZZT"),
        ({"recording": sound(tone(1.0)), "text": "a" * 9_000}, {}, 400, "Part exceeded"),
        ({"recording": bytes(3 * serve.LARGEST)}, {}, 413, "more than 9,000,000"),
        ({"recording": "text"}, {}, 400, "the form's fields are"),
        ({"recording": b"x", "text": b"a file"}, {}, 400, "Too many files"),
        ({"recording": b"x", "name": "me"}, {}, 400, "the form's fields are"),
        ({}, {"Content-Type": "application/json"}, 400, "not a form"),
        ({}, {"method": "GET"}, 405, "Not Allowed"),
        ({}, {"path": "/none"}, 404, "Not Found"),
        ({}, {"Origin": "http://evil.example"}, 403, "only a page of"),
        ({}, {"Origin": "null"}, 403, "only a page of"),
    ],
)
def test_a_request_that_cannot_be_used_is_told_why_in_one_line(running, arguments, how, status, message):
    answered, answer, _ = post(running[0], form(**arguments), **how)
    assert answered == status and message in answer["error"] and "\n" not in answer["error"]
    assert TypeAdapter(assessor.Refusal).validate_python(answer)


def test_its_own_page_may_ask_and_that_of_a_proxy_that_was_named(running, ask, recordings):
    for origin in (f"http://127.0.0.1:{running[0]}", "https://scores.example"):
        assert ask(recordings[0], Origin=origin)[0] == 200


def test_a_full_service_says_so_and_answers_those_that_wait(running, ask, assess, recordings, monkeypatch):
    go_on, answer = threading.Event(), assess.answer
    monkeypatch.setattr(assess, "answer", lambda questions: go_on.wait(60) and answer(questions))
    monkeypatch.setattr(serve, "WAITING", 3)
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(ask, recordings[0]) for _ in range(3)]
        while running[1].requests < 3:
            time.sleep(0.01)
        status, refused, headers = ask(bytes(serve.LARGEST))
        assert status == 503 and "try again" in refused["error"] and int(headers["Retry-After"]) > 0
        go_on.set()
        assert [future.result()[0] for future in waiting] == [200] * 3


def test_a_client_that_goes_away_or_is_slow_holds_nothing(running, ask, recordings, monkeypatch):
    monkeypatch.setattr(serve, "ARRIVING", 0.5)
    head = b"POST /assess HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\nContent-Type: multipart/form-data; boundary=x"
    for slow in (False, True):
        with socket.create_connection(("127.0.0.1", running[0])) as client:
            client.sendall(head + b"\r\n\r\n" + form(recordings[0])[:5000])
            while not running[1].requests:
                time.sleep(0.01)
            assert not slow or b"408" in client.recv(1000).splitlines()[0]
    while running[1].requests:
        time.sleep(0.01)
    assert ask(recordings[0])[0] == 200


def test_a_head_without_an_end_and_connections_without_one_are_cut_off(running, ask, recordings, monkeypatch):
    monkeypatch.setattr(serve, "HEAD", 0.5)
    address = ("127.0.0.1", running[0])
    with socket.create_connection(address, timeout=5) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        assert 0.4 < lasted(client) < 5  # of its second head, too
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
    assert ask(content, "we see it")[0] == 200 and ask(content, "secret")[0] in (200, 422)
    assert list(tmp_path.iterdir()) == [] and "".join(capfd.readouterr()) == ""


# ----------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    "arguments, message",
    [(["--port", "{taken}"], "{taken}: Address already in use"), (["--origin", "a.example"], "--origin.*a.example")],
)
def test_a_users_mistake_is_named_before_a_model_is_loaded(monkeypatch, arguments, message):
    monkeypatch.setattr(assessor, "Assessor", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("sys.argv", ["serve", "--base", *(text.format(taken=port) for text in arguments)])
        with pytest.raises(cli.InputError, match=message.format(taken=port)):
            serve.main()


@pytest.mark.slow
def test_it_says_its_address_answers_and_ends_with_ctrl_c(run, recordings, tmp_path):
    arguments = ["--adapter", run[0] / "out", "--port", 0, "--max-new-tokens", 5]
    command = [sys.executable, "-m", "analysis.serve", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell has its background jobs ignore it
    process = subprocess.Popen(command, cwd=tmp_path, **pipes, preexec_fn=default)
    try:
        port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ ", process.stdout.readline())[1])
        assert post(port, form(recordings[0]))[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", "/")
        assert "synthetic words, and no human voice" in connection.getresponse().read().decode()
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and (out, err) == ("", "") and list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------------
# The page


def marked(questions):
    """Results with a mark of every kind, whatever was recorded."""
    words = [("WE", [("W", "IY")]), ("CALL", [("K", "AO", "L")]), ("IT", [("IH", "T")])]
    output = json.dumps({"word_transcript": "WE <b>", "phoneme_transcript": "W IY K AA L AH"})
    scores = {name: [0, 0, 0, 0, 0, 0, 0.5, 0.25, 0.25, 0, 0] for name in prompts.SCORES}
    asked = [assessor.Question(q.file, None, q.rate, 2.0, q.trimmed, q.text, words) for q in questions]
    return [assessor.result(question, scores, output, False) for question in asked]


@pytest.fixture
def browser(chromium, tmp_path):
    """Chromium whose microphone plays a file."""
    (tmp_path / "microphone.wav").write_bytes(sound(tone(3.0, 48_000), 48_000, subtype="PCM_16"))
    return chromium(
        "use-fake-device-for-media-stream",
        "use-fake-ui-for-media-stream",
        f"use-file-for-fake-audio-capture={tmp_path / 'microphone.wav'}",
    )


def test_the_page_runs_its_own_script_alone_and_says_what_the_model_knows(running, utterances):
    connection = http.client.HTTPConnection("127.0.0.1", running[0])
    connection.request("GET", "/")
    answer = connection.getresponse()
    page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert answer.status == 200 and "default-src 'none'" in policy and policy.count("'sha256-") == 2
    assert not re.search(r'https?://|innerHTML|style="|\bon\w+="', page) and "1000 * 30" in page
    assert "It knows &lt;few&gt; words." in page and f'data-text="{utterances[0].text}"' in page


@pytest.mark.slow
def test_a_browser_records_shows_the_words_and_plays(running, assess, browser, monkeypatch):
    from selenium.webdriver.support.ui import WebDriverWait

    asked = []
    monkeypatch.setattr(assess, "answer", lambda questions: asked.extend(questions) or marked(questions))

    def text(*selectors):
        return [element.text for selector in selectors for element in browser.find_elements("css selector", selector)]

    def wait(condition):
        WebDriverWait(browser, 30).until(lambda _: condition())

    phone = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.get(f"http://127.0.0.1:{running[0]}/")
    browser.find_element("id", "record").click()
    wait(lambda: text("#record") == ["Stop"])
    time.sleep(1.5)
    browser.find_element("id", "record").click()
    wait(lambda: text("#words b"))
    assert asked[0].text == "We call it bear" and 1.0 < asked[0].utterance.samples / data.SAMPLE_RATE < 5
    heard = read_audio(asked[0].utterance.recording)
    spectrum = np.abs(np.fft.rfft(heard))
    assert spectrum.argmax() * data.SAMPLE_RATE / len(heard) == pytest.approx(440, abs=2)  # the file's tone
    assert text("#words ol li") == ["W", "IY", "K", "AO>AA", "L", "IH>AH", "-T"]
    assert text("#words b") == ["WE", "CALL\nMispronunciation", "IT\nMispronunciation"]
    assert text("#scores figure b") == ["6.8"] * 4 and text("#heard")[0].startswith("WE <b>")
    assert browser.execute_script("return document.documentElement.scrollWidth") == 400
    played = "const a = document.querySelector('audio'); return [a.src.slice(0, 5), a.duration]"
    source, seconds = browser.execute_script(played)
    assert source == "blob:" and seconds == pytest.approx(len(heard) / data.SAMPLE_RATE, abs=0.01)

    monkeypatch.setattr(serve, "WAITING", 0)
    browser.find_element("id", "record").click()
    wait(lambda: text("#record") == ["Stop"])
    browser.find_element("id", "record").click()
    wait(lambda: "try again" in text("#state")[0])
    assert not browser.find_element("id", "result").is_displayed()
    logged = [entry["message"] for entry in browser.get_log("browser")]
    assert [line for line in logged if "503" not in line and "deprecated" not in line] == []
