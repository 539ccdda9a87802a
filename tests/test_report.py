"""The page: what it shows, that nothing in it runs or is loaded from elsewhere, and what it may replace."""

from html.parser import HTMLParser
import json
import os
from pathlib import Path
import re
import shutil
from types import SimpleNamespace

from conftest import sound, tone
import pytest
from records import one_hot, write

from analysis import report
import data
import metrics
import prompts
from support import cli, predictions

ATTACK = "</script><img src=x onerror=alert(1)>\"'&"
TABLES = [
    (
        "Table <3>",
        ["accuracy", "PER"],
        [("paper", ["0.656", "0.114"]), ("this run", ["-", "1,000.5"]), ("floor", ["-0.041*", "0.2"])],
    )
]


def clip():
    """A tone as the content of a sound file."""
    return sound(tone(1.0))


def utterance(id, text="WE SEE", recording=clip):
    """As much of a data.Utterance as a page asks for."""
    return SimpleNamespace(id=id, recording=recording, text=text, speaker="0001")


def apa(id, total=5, human=5, **more):
    output = prompts.apa_target(dict.fromkeys(prompts.SCORES, 5) | {"total": total})
    reference = dict.fromkeys(prompts.SCORES, 5) | {"total": human}
    return {"id": id, "task": "APA", "output": output, "reference": reference} | more


def mdd(id, phones="W IH S IY", text="WE SEE", **more):
    reference = {"word_transcript": "WE SEE", "canonical": ["W", "IY", "S", "IY"], "heard": ["W", "IH", "S", "IY"]}
    return {"id": id, "task": "MDD", "output": prompts.mdd_target(text, phones.split()), "reference": reference} | more


def page_of(records, utterances=None, title="Report", tables=TABLES, figure5=None):
    return report.make_page(title, tables, ["a note with <b>"], records, utterances or {}, figure5, "python <again>")


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


def test_the_sections_stand_in_their_order_and_without_probabilities_there_is_no_calibration():
    plain = page_of([apa("a"), mdd("a")])
    assert headings(plain) == ["Results", "Predicted and human scores", "Largest errors", "This page again"]
    page = page_of([apa("a", scores=one_hot(5)), mdd("a")], figure5=b"\x89PNG")
    assert headings(page) == [
        "Results",
        "Predicted and human scores",
        "PER and accuracy score",
        "Calibration of the expected scores",
        "Largest errors",
        "This page again",
    ]
    assert page.count('role="img"') == 8 and "data:image/png;base64,iVBORw==" in page
    assert "<h3>Table &lt;3&gt;</h3>" in page and "<td>1,000.5</td>" in page
    assert "<pre>python &lt;again&gt;</pre>" in page


def test_text_of_models_corpus_and_caller_is_text():
    lines = [apa(ATTACK), mdd(ATTACK, phones=ATTACK, text=ATTACK), apa("b", output=ATTACK), mdd("b", output=ATTACK)]
    lines.append(apa("c", output="half a surrogate pair: \ud83d"))
    known = {ATTACK: utterance(ATTACK, text=ATTACK)}
    page = page_of(lines, known, title=ATTACK, tables=[(ATTACK, [ATTACK], [(ATTACK, [ATTACK])])])
    elements = Elements(page)
    assert not elements.named("img") and len(elements.named("script")) == 1
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    assert "<img" not in page and page.lower().count("</script>") == 1
    assert page.count("&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;&quot;&#x27;&amp;") >= 10


def test_nothing_is_loaded_from_elsewhere():
    page = page_of([apa("a", scores=one_hot(5)), mdd("a")], {"a": utterance("a")})
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
    known = {str(i): utterance(str(i), recording=lambda i=i: read.append(i) or clip()) for i in range(45)}
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


def test_unparsed_outputs_are_named_and_cut():
    lines = [apa("a", output="x" * 1000, truncated=True), mdd("a", output="WE <unk>")]
    page = page_of(lines)
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
def test_what_is_missing_is_said_and_nothing_fails(records, known):
    page = page_of(records, known, tables=[])
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
# The command


def evaluated(folder, lines, label="epoch-3"):
    """A folder as evaluate.py leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({"evaluated": label, "utterances": len(lines) // 2}))
    write(folder / "predictions.jsonl", lines)
    return folder


def trained_on(folder, corpus, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"data": str(corpus), "strategy": "unfreeze", **settings}
    (folder / "settings.json").write_text(json.dumps(settings))


def make(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, arguments)])
    report.main()


@pytest.fixture
def lines(corpus):
    """What a system that writes the canonical phones answers to the test part of the corpus."""
    return [
        {"id": u.id, "task": task, "speaker": u.speaker, "output": output, "reference": data.reference(u, task)}
        for u in data.read_corpus(corpus, "test")[:6]
        for task, output in zip(prompts.TASKS, (prompts.apa_target(u.scores), prompts.mdd_target(u.text, u.canonical)))
    ]


@pytest.mark.parametrize(
    "folder, label, row",
    [(".", "epoch-2", "unfreeze, epoch 2"), (".", "predictions", None), ("base", "base", "unmodified")],
)
def test_the_page_of_a_run_has_all_tables_its_recordings_and_how_to_make_it_again(
    monkeypatch, corpus, lines, tmp_path, folder, label, row
):
    """The corpus is that of the training: of the run folder, or of the epoch in it."""
    trained_on(tmp_path / "out", corpus)
    trained_on(tmp_path / "out" / "epoch-2", corpus, epoch=2)
    evaluated(tmp_path / "out" / folder, lines, label)
    make(monkeypatch, tmp_path / "out" / folder)
    page = (tmp_path / "out" / folder / "report.html").read_text(encoding="utf-8")
    captions = ["Table 3", "Published systems", "Detection", "Mean error", "Phones", "Phones heard"]
    assert [re.search(f"<h3>{caption}", page).start() for caption in captions] == sorted(
        re.search(f"<h3>{caption}", page).start() for caption in captions
    )
    assert f"&#x27;paper, {row}&#x27;" in page if row else "*: within" not in page
    assert page.count("<audio ") == 6 and "says everything right" in page and "HMamba" in page
    assert f"<pre>python -m analysis.report {tmp_path / 'out' / folder}</pre>" in page


def test_a_page_without_its_corpus_has_no_recordings_unless_the_user_named_it(
    monkeypatch, corpus, lines, tmp_path, capsys
):
    run, page = evaluated(tmp_path / "out", lines), tmp_path / "page.html"
    for settings in ({}, {"corpus": tmp_path / "gone"}):
        if settings:
            trained_on(run, **settings)
        make(monkeypatch, run, "--output", page)
        assert "<audio " not in page.read_text() and "Without recordings" in page.read_text()
        assert "Without recordings" in capsys.readouterr().out
    with pytest.raises(cli.InputError, match="gone"):
        make(monkeypatch, run, "--data", tmp_path / "gone")
    with pytest.raises(cli.InputError, match="--split"):
        make(monkeypatch, run, "--data", corpus, "--split", "train")
    make(monkeypatch, run, "--output", page, "--data", corpus)
    assert page.read_text().count("<audio ") == 6


@pytest.mark.parametrize("missing", ["metrics.json", "predictions.jsonl"])
def test_a_folder_that_was_not_evaluated_is_refused(monkeypatch, lines, tmp_path, missing):
    run = evaluated(tmp_path / "out", lines)
    (run / missing).unlink()
    with pytest.raises(cli.InputError, match=missing):
        make(monkeypatch, run)
    assert not (run / "report.html").exists()


def test_half_a_surrogate_pair_and_an_earlier_page_are_no_hindrance(monkeypatch, lines, tmp_path):
    lines[1]["output"] = r'{"word_transcript": "WE SEE", "phoneme_transcript": "W \ud800 S"}'
    lines[3]["output"] = prompts.mdd_target("x" * 5000, ["W"])
    run = evaluated(tmp_path / "out", lines)
    for _ in range(2):
        make(monkeypatch, run)
    assert predictions.read(run / "predictions.jsonl") == lines


@pytest.mark.parametrize(
    "name, prepare, message",
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
def test_a_report_replaces_nothing_else(monkeypatch, tmp_path, name, prepare, message):
    run = evaluated(tmp_path / "run", [apa("a"), mdd("a")])
    if prepare:
        prepare(tmp_path / name)
    with pytest.raises(cli.InputError, match=message) as error:
        make(monkeypatch, run, "--output", tmp_path / name)
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


@pytest.mark.slow
def test_a_browser_plays_sorts_and_fits_a_phone(tmp_path, browser):
    from selenium.webdriver.common.keys import Keys

    lines = [
        apa("a", human=8, scores=one_hot(7, 6)),
        mdd("a", "W " * 60, text="W" * 300),
        apa("b", output=ATTACK),
        mdd("b", output="x" * 900),
    ]
    wide = [("A wide table", [f"column {i}" for i in range(20)], [("row" * 20, ["0.5"] * 20)])]
    page = page_of(lines, {"a": utterance("a")}, title="A" * 80, tables=TABLES + wide)
    (tmp_path / "report.html").write_text(page, encoding="utf-8", errors="replace")
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
