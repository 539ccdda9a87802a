import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import data
import metrics
import prompts
import report
from support import cli, files

ATTACK = "</script><img src=x onerror=alert(1)>\"'&"
TABLES = [
    (
        "Table <3>",
        ["accuracy", "PER"],
        [("paper", ["0.656", "0.114"]), ("this run", ["-", "1,000.5"]), ("floor", ["-0.041*", "0.2"])],
    )
]


def clip(seconds=1.0, format="WAV"):
    """A tone as the content of a sound file."""
    soundfile = pytest.importorskip("soundfile")
    time = np.arange(int(seconds * data.SAMPLE_RATE)) / data.SAMPLE_RATE
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(2 * np.pi * 440 * time), data.SAMPLE_RATE, format=format)
    return file.getvalue()


def utterance(id, text="WE SEE", recording=clip):
    words = (data.Word("WE", ("W", "IY"), ("W", "IH"), 6, 1), data.Word("SEE", ("S", "IY"), ("S", "IY"), 10, 0))
    return data.Utterance(
        id, recording, data.SAMPLE_RATE, text, dict.fromkeys(prompts.SCORES, 5), words, "0001", 9, "f"
    )


def apa(id, total=5, human=5, **more):
    output = prompts.apa_target(dict.fromkeys(prompts.SCORES, 5) | {"total": total})
    reference = dict.fromkeys(prompts.SCORES, 5) | {"total": human}
    return {"id": id, "task": "APA", "output": output, "reference": reference} | more


def mdd(id, phones="W IH S IY", text="WE SEE", **more):
    reference = {"word_transcript": "WE SEE", "canonical": ["W", "IY", "S", "IY"], "heard": ["W", "IH", "S", "IY"]}
    return {"id": id, "task": "MDD", "output": prompts.mdd_target(text, phones.split()), "reference": reference} | more


def one_hot(value, low=None):
    """Probabilities of the values 0-10 of all four scores: all of it on `value`, or half of it on `low`."""
    probabilities = [0.0] * 11
    for chosen in (value, value if low is None else low):
        probabilities[chosen] += 0.5
    return dict.fromkeys(prompts.SCORES, probabilities)


def write(tmp_path, records, utterances=None, title="Report", tables=TABLES, figure5=None):
    path = tmp_path / "report.html"
    report.write_report(path, title, tables, ["a note with <b>"], records, utterances or {}, figure5)
    assert not list(tmp_path.glob(f"*{files.UNFINISHED}"))
    return path.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """All elements of a page, as (name, attributes)."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def named(self, name):
        return [attributes for tag, attributes in self.found if tag == name]


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_the_sections_stand_in_their_order_and_without_probabilities_there_is_no_calibration(tmp_path):
    png = tmp_path / "figure5.png"
    png.write_bytes(b"\x89PNG")
    plain = write(tmp_path, [apa("a"), mdd("a")])
    assert headings(plain) == ["Results", "Predicted and human scores", "Largest errors"]
    page = write(tmp_path, [apa("a", scores=one_hot(5)), mdd("a")], figure5=png)
    assert headings(page) == [
        "Results",
        "Predicted and human scores",
        "PER and accuracy score",
        "Calibration of the expected scores",
        "Largest errors",
    ]
    assert page.count('role="img"') == 8 and "data:image/png;base64,iVBORw==" in page
    assert "<h3>Table &lt;3&gt;</h3>" in page and "<td>1,000.5</td>" in page


def test_text_of_models_corpus_and_caller_is_text(tmp_path):
    lines = [apa(ATTACK), mdd(ATTACK, phones=ATTACK, text=ATTACK), apa("b", output=ATTACK), mdd("b", output=ATTACK)]
    lines.append(apa("c", output="half a surrogate pair: \ud83d"))
    known = {ATTACK: utterance(ATTACK, text=ATTACK)}
    page = write(tmp_path, lines, known, title=ATTACK, tables=[(ATTACK, [ATTACK], [(ATTACK, [ATTACK])])])
    elements = Elements(page)
    assert not elements.named("img") and len(elements.named("script")) == 1
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    assert "<img" not in page and page.lower().count("</script>") == 1
    assert page.count("&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;&quot;&#x27;&amp;") >= 10


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page = write(tmp_path, [apa("a", scores=one_hot(5)), mdd("a")], {"a": utterance("a")})
    elements = Elements(page)
    sources = [
        value
        for _, attributes in elements.found
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action")
    ]
    assert len(sources) == 1 and sources[0].startswith("data:audio/wav;base64,UklGR")
    assert not elements.named("link") and "url(" not in page and "@import" not in page
    assert "://" not in re.sub(r"base64,[\w+/=]+", "", page)
    (policy,) = [meta["content"] for meta in elements.named("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:; style-src 'sha256-")
    assert "unsafe" not in policy and "*" not in policy


def test_the_largest_errors_come_first():
    # error: a |5 - 5| + 0/4, b |8 - 5| + 1/4, c unparsed 10 + 4/4, d missing 0 + 2/4, e |6.5 - 5| missing
    lines = [
        apa("a"),
        mdd("a"),
        apa("b", total=8),
        mdd("b", "W IH S"),
        apa("c", output="no"),
        mdd("c", output="{"),
        mdd("d", "W IY S IY T"),
        apa("e", output="no", scores=one_hot(8, 5)),
    ]
    errors = {answer.id: answer.error for answer in report.read_answers(lines)}
    assert errors == {"a": 0, "b": 3.25, "c": 11, "d": 0.5, "e": 1.5}
    page = report.show_largest(report.read_answers(lines), {})
    assert re.findall(r'<p class="note">(\w), error ([\d.]+), PER ([\d.-]+)</p>', page) == [
        ("c", "11.00", "1.000"),
        ("b", "3.25", "0.250"),
        ("e", "1.50", "-"),
        ("d", "0.50", "0.500"),
        ("a", "0.00", "0.000"),
    ]


def test_forty_utterances_are_shown_and_only_their_recordings_are_read():
    read = []
    known = {str(i): utterance(str(i), recording=lambda i=i: read.append(i) or clip(0.1)) for i in range(45)}
    lines = [apa(str(i), total=i % 5, human=0 if i else 10) for i in range(45)]
    page = report.show_largest(report.read_answers(lines), known)
    assert page.count("<article>") == page.count("<audio ") == len(read) == 40
    assert read[0] == 0 and not {20, 25, 30, 35, 40} & set(read)  # the last five of eight without error


def test_phones_are_aligned_and_marked_with_signs():
    pairs = [("W", "W"), ("IH", "IY"), ("S", None), (None, "T")]
    assert [metrics.kind_of(*pair) for pair in pairs] == ["same", "substituted", "missing", "added"]
    shown = re.sub(r"<.*?>", " ", report.show_phones(pairs)).split()
    assert shown == ["W", "=", "W", "IH", "≠", "IY", "S", "−", "–", "–", "+", "T"]
    (answer,) = report.read_answers([mdd("a", "W IY IY")])
    assert answer.pairs == [("W", "W"), ("IH", None), ("S", "IY"), ("IY", "IY")] and answer.per == 2 / 4


def test_calibration_bins_are_one_point_wide_and_the_last_one_holds_ten():
    bins = report.calibration_bins([0.0, 7.0, 7.5, 7.999, 8.0, 9.5, 10.0], [1, 6, 7, 8, 9, 10, 9])
    assert list(bins) == [0, 7, 8, 9]
    assert bins[0] == (1, 0, 1) and bins[8] == (1, 8, 9) and bins[9] == (2, 9.75, 9.5)
    assert bins[7] == (3, pytest.approx(22.499 / 3), 7)
    page = report.draw_calibration(report.read_answers([apa("a", human=8, scores=one_hot(7, 6)), apa("b")]))
    assert '<tr><th scope="row">total, 6 to 7</th><td>1</td><td>6.50</td><td>8.00</td></tr>' in page
    assert "Utterances: 1, in bins" in page


def test_the_heat_maps_count_utterances_by_rounded_expectation():
    lines = [
        apa("a", human=8, scores=one_hot(7, 6)),
        apa("b", total=7, human=8),
        apa("c", total=0, human=0),
        apa("d", output="x"),
    ]
    page = report.draw_scores(report.read_answers(lines))
    assert "<title>human 8, predicted 7: 2</title>" in page and "<title>human 0, predicted 0: 1</title>" in page
    assert "Utterances: 3;" in page and "left out: 1." in page
    assert "no PCC: all 3 human scores are 5" in page


def test_unparsed_outputs_are_named_and_cut(tmp_path):
    lines = [apa("a", output="x" * 1000, truncated=True), mdd("a", output="WE <unk>")]
    page = write(tmp_path, lines)
    assert "APA output, unparsed</b>, cut off at the length limit (the first 400 of 1,000 characters)" in page
    assert f"<pre>{'x' * 400}</pre>" in page and "x" * 401 not in page
    assert "MDD output, unparsed</b> (8 characters):</p><pre>WE &lt;unk&gt;</pre>" in page


@pytest.mark.parametrize(
    "records",
    [
        [],
        [apa("a")],
        [mdd("a")],
        [apa("a", output=""), mdd("a", output="")],
        [mdd("a", phones="", reference={"word_transcript": "", "canonical": [], "heard": []})],
    ],
)
@pytest.mark.parametrize("known", [{}, {"a": utterance("a")}])
def test_what_is_missing_is_said_and_nothing_fails(tmp_path, records, known):
    page = write(tmp_path, records, known, tables=[])
    assert page.count("<article>") == len({record["id"] for record in records})
    assert page.count("<audio ") == (1 if records and known else 0)
    assert ("No MDD answer" in page) == (records == [apa("a")])


def gone():
    raise FileNotFoundError(2, "No such file or directory", "<gone>.wav")


@pytest.mark.parametrize(
    "recording, shown",
    [
        (gone, "cannot be read: [Errno 2] No such file or directory: &#x27;&lt;gone&gt;.wav&#x27;"),
        (lambda: b"", "of a type that is not played here"),
        (lambda: b"RIFF\0\0\0\0AVI ", "of a type that is not played here"),
        (lambda: b"RIFF\n\0\0\0WAVEfmt ", 'src="data:audio/wav;base64,'),
        (lambda: b"fLaC\0", 'src="data:audio/flac;base64,'),
        (lambda: b"OggS\0", 'src="data:audio/ogg;base64,'),
        (lambda: b"ID3\4", 'src="data:audio/mpeg;base64,'),
        (lambda: b"\xff\xfb\x90", 'src="data:audio/mpeg;base64,'),
    ],
)
def test_a_recording_is_played_by_its_type_or_the_reason_is_given(recording, shown):
    assert shown in report.show_player(utterance("a", recording=recording))


# ----------------------------------------------------------------------------------------------------------------------
# Where it is written


def test_a_report_replaces_an_earlier_one(tmp_path):
    path = tmp_path / "new" / "report.html"
    report.check_path(path)
    report.write_report(path, "T" * 5000, TABLES, [], [], {})
    report.check_path(path)


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("report.txt", None, "report.txt is not the name of an .html file"),
        ("out", Path.mkdir, "out is not the name of an .html file"),
        ("report.html", Path.mkdir, "report.html cannot be read"),
        ("report.html", lambda path: path.write_text("<!DOCTYPE html>mine"), "another name"),
        ("report.html", lambda path: path.write_bytes(bytes(range(256))), "another name"),
        ("report.html", lambda path: path.write_text("x" * 5000 + report.GENERATOR), "another name"),
        ("report.html", lambda path: path.symlink_to("nowhere"), "report.html cannot be read"),
        ("report.html", os.mkfifo, "not a regular file"),
        ("file/report.html", lambda path: path.parent.touch(), "file"),
    ],
)
def test_a_report_replaces_nothing_else(tmp_path, name, make, message):
    if make:
        make(tmp_path / name)
    with pytest.raises(cli.InputError, match=message) as error:
        report.check_path(tmp_path / name)
    assert len(str(error.value).splitlines()) == 1


# ----------------------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = [
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        "autoplay-policy=no-user-gesture-required",
        f"user-data-dir={tmp_path / 'profile'}",
    ]
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


def test_a_browser_plays_sorts_and_fits_a_phone(tmp_path, browser):
    from selenium.webdriver.common.keys import Keys

    lines = [
        apa("a", human=8, scores=one_hot(7, 6)),
        mdd("a", "W " * 60, text="W" * 300),
        apa("b", output=ATTACK),
        mdd("b", output="x" * 900),
    ]
    wide = [("A wide table", [f"column {i}" for i in range(20)], [("row" * 20, ["0.5"] * 20)])]
    write(tmp_path, lines, {"a": utterance("a")}, title="A" * 80, tables=TABLES + wide)
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.get((tmp_path / "report.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360

    played = browser.execute_async_script("""
        const [done] = arguments, clip = document.querySelector("audio");
        clip.addEventListener("timeupdate", () => clip.currentTime > 0 && done(clip.currentTime));
        clip.addEventListener("error", () => done(clip.error.message));
        clip.play().catch((error) => done(String(error)));""")
    assert isinstance(played, float) and 0 < played <= 1

    def column(number):
        cells = "return [...document.querySelector('tbody').rows].map((row) => row.cells[arguments[0]].textContent)"
        return browser.execute_script(cells, number)

    accuracy, per = browser.find_elements("css selector", "table:first-of-type th button")[1:3]
    accuracy.click()
    assert column(1) == ["-0.041*", "0.656", "-"]
    accuracy.send_keys(Keys.ENTER)
    assert column(1) == ["0.656", "-0.041*", "-"]
    assert column(0) == ["paper", "floor", "this run"]
    per.send_keys(Keys.SPACE)
    assert column(2) == ["0.114", "0.2", "1,000.5"]
    order = "return [...document.querySelector('thead tr').cells].map((head) => head.getAttribute('aria-sort'))"
    assert browser.execute_script(order) == [None, None, "ascending"]
    assert [json.dumps(entry) for entry in browser.get_log("browser")] == []
