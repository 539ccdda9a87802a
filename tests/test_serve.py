"""The service over HTTP, on the loopback."""

from concurrent.futures import ThreadPoolExecutor
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

from conftest import ROOT, script, sound, tone
import numpy as np
import processes
import pytest
import uvicorn

from analysis import assessor, serve
import data
import prompts
from support import cli

SENTENCE = "we see it"


@pytest.fixture(scope="module")
def assess(run, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("assess"))
        yield assessor.Assessor(run[0] / "out", max_new_tokens=20)


@pytest.fixture(scope="module")
def recordings(corpus):
    return [utterance.recording() for utterance in data.read_corpus(corpus, "test", limit=4)]


@pytest.fixture(scope="module")
def running(assess):
    """(port, serve.Service) of a service in this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    service = serve.Service(assess)
    app = serve.application(service, [f"http://127.0.0.1:{port}"])
    server = uvicorn.Server(uvicorn.Config(app, http="h11", lifespan="on", log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield port, service
    server.should_exit = True
    thread.join()


@pytest.fixture
def ask(running):
    port, _ = running
    return lambda *arguments, **more: post(port, form(*arguments), **more)


def form(recording=None, text=None, **others):
    """A body of multipart/form-data; a value in bytes becomes a file."""
    parts = {"sound": recording, "text": text} | others
    body = b""
    for name, value in parts.items():
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


# ----------------------------------------------------------------------------------------------------------------------
# Answers


def test_an_answer_is_what_the_assessor_says(ask, assess, recordings):
    stereo = sound(np.stack([tone(1.0, 44_100)] * 2, axis=1), 44_100, "FLAC")
    for recording, text in [(recordings[0], SENTENCE), (recordings[1], None), (stereo, SENTENCE)]:
        status, answer, headers = ask(recording, text)
        assert (status, answer) == (200, assess(recording, text)) and headers["Content-Type"] == "application/json"


def test_many_requests_at_once_get_the_answers_of_single_ones(ask, assess, recordings, monkeypatch):
    sizes, answer = [], assess.answer
    monkeypatch.setattr(assess, "answer", lambda questions: sizes.append(len(questions)) or answer(questions))
    asked = [(b"no sound", None) if i % 7 == 3 else (recordings[i % 4], [SENTENCE, None][i % 2]) for i in range(24)]
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda pair: ask(*pair), asked))
    single = {pair: answer([assessor.ask(*pair, assess.lexicons)])[0] for pair in set(asked) if pair[0] != b"no sound"}
    for pair, (status, answered, _) in zip(asked, answers):
        assert status == 422 and "not a readable" in answered["error"] if pair not in single else status == 200
        assert pair not in single or alike(answered, single[pair])
    assert max(sizes) > 1 and max(sizes) <= assessor.BATCH and sum(sizes) == sum(pair in single for pair in asked)


def test_a_recording_that_the_model_fails_on_loses_no_other(running, ask, assess, recordings, monkeypatch):
    _, service = running
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
        while service.asked.qsize() < 4:  # they go to the model together
            time.sleep(0.01)
        go_on.set()
        answers = [future.result() for future in answers]
    assert [status for status, _, _ in answers] == [200, 500, 200, 200, 200]
    assert answers[1][1] == {"version": 1, "error": "the service failed: its log says why"}
    assert ask(recordings[0])[0] == 200 and service.requests == 0


def test_half_of_a_surrogate_pair_is_sent(ask, assess, recordings, monkeypatch):
    monkeypatch.setattr(assess, "answer", lambda questions: [{"words": "\ud800"}])
    assert ask(recordings[0])[:2] == (200, {"words": "\ud800"})


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ({"recording": b""}, 422, "recording: not a readable sound file"),
        ({"recording": b"RIFF but no more"}, 422, "recording: not a readable sound file"),
        ({"recording": sound(tone(1.0))[:-1000]}, 422, "cut off"),
        ({"recording": sound(tone(31.0))}, 422, "31.00 s is longer than 30 s"),
        ({"recording": sound(np.zeros(16_000))}, 422, "is silence"),
        ({"recording": sound(tone(1.0)), "text": "xqzzt"}, 422, "XQZZT"),
        ({"recording": sound(tone(1.0)), "text": ""}, 422, "has no words"),
        ({"recording": sound(tone(1.0)), "text": "a " * 251}, 413, "502 characters, more than 500"),
        ({"recording": sound(tone(1.0)), "text": "a" * 9_000}, 400, "Part exceeded"),
        ({"recording": bytes(serve.LARGEST)}, 413, "more than 9,000,000"),
        ({"recording": bytes(3 * serve.LARGEST)}, 413, "more than 9,000,000"),
        ({"recording": "text"}, 400, "the form's fields are"),
        ({"text": "we"}, 400, "the form's fields are"),
        ({"recording": b"x", "text": b"a file"}, 400, "Too many files"),
        ({"recording": b"x", "name": "me"}, 400, "the form's fields are"),
        ({"recording": b"x", "text": "we", "name": "me"}, 400, "Too many fields"),
    ],
)
def test_a_request_that_cannot_be_used_is_told_why_in_one_line(running, arguments, status, message):
    answered, answer, _ = post(running[0], form(**arguments))
    assert answered == status and set(answer) == {"version", "error"} and answer["version"] == assessor.VERSION
    assert message in answer["error"] and "\n" not in answer["error"]


@pytest.mark.parametrize(
    "path, method, content_type, status",
    [
        ("/assess", "GET", None, 405),
        ("/", "POST", None, 405),
        ("/none", "GET", None, 404),
        ("/assess", "POST", "application/json", 400),
        ("/assess", "POST", "multipart/form-data; boundary=y", 400),
        ("/assess", "POST", "multipart/form-data", 400),
    ],
)
def test_another_path_method_or_content_type_is_refused(running, path, method, content_type, status):
    headers = {"Content-Type": content_type} if content_type else {}
    assert post(running[0], form(b"x"), path, method, **headers)[0] == status


def test_a_body_of_unknown_length_is_bounded_too(running):
    chunks = (b"-" * 500_000 for _ in range(30))
    assert post(running[0], chunks)[0] in (400, 413)
    body = form(bytes(2 * serve.LARGEST))
    assert post(running[0], (body[i : i + 500_000] for i in range(0, len(body), 500_000)))[0] == 413


def test_another_page_of_a_browser_may_not_ask_whatever_name_it_gave_this_machine(running, ask, recordings):
    port = running[0]
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{port + 1}", f"http://rebound.example:{port}"):
        status, answer, _ = ask(recordings[0], Origin=origin)
        assert status == 403 and "only a page of" in answer["error"]
    assert ask(recordings[0], Origin=f"http://127.0.0.1:{port}")[0] == 200


def test_a_full_service_says_so_and_answers_those_that_wait(running, ask, assess, recordings, monkeypatch):
    go_on, answer = threading.Event(), assess.answer
    monkeypatch.setattr(assess, "answer", lambda questions: go_on.wait(60) and answer(questions))
    monkeypatch.setattr(serve, "WAITING", 3)
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(ask, recordings[0]) for _ in range(3)]
        while running[1].requests < 3:
            time.sleep(0.01)
        for size in (1, serve.LARGEST):
            status, refused, headers = ask(bytes(size))
            assert status == 503 and "try again" in refused["error"] and int(headers["Retry-After"]) > 0
        go_on.set()
        assert [future.result()[0] for future in waiting] == [200] * 3
    assert running[1].requests == 0 and ask(recordings[0])[0] == 200


def test_a_client_that_goes_away_or_is_slow_holds_nothing(running, ask, recordings, monkeypatch):
    monkeypatch.setattr(serve, "ARRIVING", 0.5)
    head = b"POST /assess HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\nContent-Type: multipart/form-data; boundary=x"
    for slow in (False, True):
        with socket.create_connection(("127.0.0.1", running[0])) as client:
            client.sendall(head + b"\r\n\r\n" + form(recordings[0])[:5000])
            while not running[1].requests:
                time.sleep(0.01)
            assert not slow or b"408" in client.recv(1000).splitlines()[0]
    with socket.create_connection(("127.0.0.1", running[0])) as client:  # before its answer
        body = form(recordings[0])
        client.sendall(head.replace(b"99999", str(len(body)).encode()) + b"\r\n\r\n" + body)
    while running[1].requests:
        time.sleep(0.01)
    assert ask(recordings[0])[0] == 200


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


@pytest.mark.parametrize("fault", [processes.hang, processes.crash, processes.hoard])
def test_a_sound_file_may_hang_crash_or_flood_its_decoder_and_no_more(ask, recordings, monkeypatch, fault):
    if fault is processes.hoard and sys.platform != "linux":
        pytest.skip("macOS has no limit of memory")
    with monkeypatch.context() as patch:
        patch.setattr(serve, "decode", fault)
        patch.setattr(serve, "DECODING", 1)
        with ThreadPoolExecutor(3) as threads:
            for status, answer, _ in threads.map(ask, [recordings[0]] * 3):
                assert status == 422 and "decoding it takes more than 1 s and 256 MB" in answer["error"]
    assert ask(recordings[0])[0] == 200


def test_the_model_gets_the_samples_and_not_the_sound_file():
    content = sound(tone(1.0, 44_100), 44_100, "OGG")
    question, decoded = assessor.ask(content, SENTENCE, [LEXICON]), serve.decode(content, SENTENCE, LEXICON)
    recording = decoded.utterance.recording()
    assert recording[:4] == b"RIFF" and decoded.rate == 44_100 and decoded.words == question.words
    read = serve.sound.read_audio
    assert np.array_equal(read(decoded.utterance.recording), read(question.utterance.recording))


LEXICON = {"WE": [("W", "IY")], "SEE": [("S", "IY")], "IT": [("IH", "T")]}


def test_nothing_is_written_to_the_disk_or_the_log(ask, monkeypatch, tmp_path, capfd):
    import tempfile

    monkeypatch.setattr(tempfile, "TemporaryFile", None)  # where a SpooledTemporaryFile would go on
    content = sound(np.stack([tone(25.0, 44_100)] * 2, axis=1), 44_100)
    assert 8_000_000 < len(content) < serve.LARGEST
    assert ask(content, "we see it")[0] == 200 and ask(content, "secret")[0] in (200, 422)
    assert ask(bytes(3 * serve.LARGEST))[0] == 413
    assert list(tmp_path.iterdir()) == [] and "".join(capfd.readouterr()) == ""


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_a_missing_package_is_named_in_one_line():
    code = "import runpy, sys; sys.modules['uvicorn'] = None; runpy.run_module('analysis.serve', run_name='__main__')"
    ended = script("-c", code, cwd=ROOT)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "uvicorn" in ended.stderr and "pip install starlette uvicorn python-multipart pebble" in ended.stderr


def test_a_users_mistake_is_named_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(assessor, "Assessor", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in [
            (["--base", "--port", port], f"--port {port}: Address already in use"),
            (["--base", "--port", "70000"], "--port"),
            (["--base", "--host", "192.0.2.1", "--port", port], "--host 192.0.2.1"),
        ]:
            monkeypatch.setattr("sys.argv", ["analysis.serve", *arguments])
            with pytest.raises(cli.InputError, match=message) as error:
                serve.main()
            assert "\n" not in str(error.value)


@pytest.mark.slow
def test_it_says_its_address_answers_and_ends_with_ctrl_c(run, recordings, tmp_path):
    arguments = ["--adapter", run[0] / "out", "--port", 0, "--max-new-tokens", 5]
    command = [sys.executable, "-m", "analysis.serve", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell has its background jobs ignore it
    process = subprocess.Popen(command, cwd=tmp_path, **pipes, preexec_fn=default)
    try:
        address = process.stdout.readline()
        port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ ", address)[1])
        assert post(port, form(recordings[0]))[0] == 200
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


# ----------------------------------------------------------------------------------------------------------------------
# The page, in a browser


def marked(questions):
    """Results with a mark of every kind, whatever was recorded."""
    words = [("WE", [("W", "IY")]), ("CALL", [("K", "AO", "L")]), ("IT", [("IH", "T")])]
    output = json.dumps({"word_transcript": "WE <b>", "phoneme_transcript": "W IY K AA L AH"})
    scores = {name: [0, 0, 0, 0, 0, 0, 0.5, 0.25, 0.25, 0, 0] for name in prompts.SCORES}
    asked = [assessor.Question(q.file, None, q.rate, 2.0, q.text, words) for q in questions]
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


def test_the_page_may_load_nothing_from_elsewhere_and_runs_its_own_script_alone(running):
    connection = http.client.HTTPConnection("127.0.0.1", running[0])
    connection.request("GET", "/")
    answer = connection.getresponse()
    page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert answer.status == 200 and "default-src 'none'" in policy and policy.count("'sha256-") == 2
    assert not re.search(r'https?://|innerHTML|style="|\bon\w+="', page) and "1000 * 30" in page


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
    heard = serve.sound.read_audio(asked[0].utterance.recording)
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
