"""The page: what it shows, that nothing in it runs or is loaded from elsewhere, and what it may replace."""

from html.parser import HTMLParser
import io
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

from conftest import call, sound, tone
import pytest
from records import copying, one_hot, write

from analysis import report
import data
import evaluate
import metrics
import prompts
from support import cli

ATTACK = "</script><img src=x onerror=alert(1)>\"'&"


def utterance(id, recording=lambda: sound(tone(1.0))):
    """As much of a data.Utterance as a page asks for."""
    return SimpleNamespace(id=id, recording=recording, text=id)


def apa(id, total=5, human=5, **more):
    output = prompts.apa_target(dict.fromkeys(prompts.SCORES, 5) | {"total": total})
    reference = dict.fromkeys(prompts.SCORES, 5) | {"total": human}
    return {"id": id, "task": "APA", "output": output, "reference": reference} | more


def mdd(id, phones="W IH S IY", text="WE SEE", **more):
    reference = {"word_transcript": "WE SEE", "canonical": ["W", "IY", "S", "IY"], "heard": ["W", "IH", "S", "IY"]}
    return {"id": id, "task": "MDD", "output": prompts.mdd_target(text, phones.split()), "reference": reference} | more


def evaluated(folder, lines, **corpus):
    """A folder as evaluate.py leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    how = {"evaluated": "epoch-3", "strategy": "lora", "epoch": 3, "model": "given/model"} | corpus
    (folder / "predictions.settings.json").write_text(json.dumps(how))
    write(folder / "predictions.jsonl", lines)
    return folder


@pytest.fixture
def page_of(tmp_path):
    """Makes the page of some lines, whose corpus is not known but for `utterances`."""

    def make(lines, utterances=(), label="epoch-3"):
        run = evaluated(tmp_path / "of-lines", lines)
        os.utime(run / "predictions.jsonl", (0, 0))
        wrote = SimpleNamespace(label=label, paper_row="lora, epoch 3")
        return report.make_page(report.Settings(run=run), lines, wrote, (utterances, [], []))[0]

    return make


def test_text_of_models_and_corpus_is_text_and_nothing_is_loaded_or_run(page_of):
    lines = [apa(ATTACK), mdd(ATTACK, phones=ATTACK, text=ATTACK), apa("b", output=ATTACK), mdd("b", output=ATTACK)]
    reference = {"word_transcript": ATTACK, "canonical": ["$"], "heard": ["$\\frac$", "\x00", "<b>"]}
    lines.append(mdd("d", phones="$_$ \x01", reference=reference))
    page = page_of(lines, [utterance(ATTACK)], label=ATTACK)
    found, parser = [], HTMLParser()
    parser.handle_starttag = lambda name, attributes: found.append((name, dict(attributes)))
    parser.feed(page)
    assert page.count("&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;&#34;&#39;&amp;") >= 10
    assert not {"script", "link", "b>"} & {name for name, _ in found} and "url(" not in page and "@import" not in page
    attributes = [pair for _, pairs in found for pair in pairs.items()]
    assert not any(name.startswith("on") for name, _ in attributes)
    sources = [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
    assert sum(source.startswith("data:") for source in sources) == 4
    assert all(source.startswith(("data:", "#")) for source in sources)
    (policy,) = [pairs["content"] for _, pairs in found if "http-equiv" in pairs]
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:;") and "script" not in policy


def test_the_same_files_give_the_same_page_with_intervals_and_the_answers_date(page_of):
    lines = [line for i in range(6) for line in (apa(f"{i}", i, i, speaker=f"{i}"), mdd(f"{i}", speaker=f"{i}"))]
    page = page_of(lines)
    assert page == page_of(lines) and "<dd>epoch-3, 1970-01-01 00:00 UTC</dd>" in page
    assert '<tr class="own"><th scope="row">this run, epoch-3</th>' in page
    for title in ("total", "Spearman total", "spread total"):
        assert f'<td title="{title}">1.000 <small>±0.000</small></td>' in page


def row(label="this run", intervals=(), **numbers):
    numbers = dict.fromkeys(report.NUMBERS, math.nan) | numbers
    return evaluate.Row(label, numbers, dict(intervals))


FLOORS = [row("copying", per=0.3, detection_f1=0.0), row("silence", per=1.0, detection_f1=0.5, accuracy_pcc=0.6)]


@pytest.mark.parametrize(
    "key, value, interval, verdict",
    [
        ("accuracy_pcc", 0.7, (0.61, 0.8), "better"),
        ("accuracy_pcc", 0.7, (0.59, 0.8), "unclear"),
        ("accuracy_pcc", math.nan, None, ""),
        ("fluency_pcc", 0.7, None, ""),  # no floor
        ("detection_f1", 0.4, None, "not better"),  # than flagging everything
        ("per", 0.2, (0.1, 0.29), "better"),
    ],
)
def test_a_number_is_better_than_its_floor_when_its_whole_interval_is(key, value, interval, verdict):
    run = row(intervals={key: interval} if interval else {}, **{key: value})
    found = report.standings(run, FLOORS, False)
    assert {s.key: s.verdict for s in found}[key] == verdict
    floor = {"per": "copying"}.get(key, "silence")
    text = f"{report.VERDICTS[verdict]} '{floor}' in {report.NUMBERS[key]}." if verdict else "Nothing could be"
    assert text in report.sentence(found)


def test_the_papers_numbers_stand_beside_its_own_corpus_alone(page_of, monkeypatch):
    lines = [apa("a"), mdd("a"), apa("b", 9, 9), mdd("b"), apa("c", 1, 1), mdd("c")]
    page = page_of(lines)
    assert "are left out: they are on the 2,500" in page and "HMamba" not in page
    monkeypatch.setattr(evaluate, "is_papers_corpus", lambda records: True)
    page = page_of(lines)
    assert "they are on the 2,500" not in page and page.count("HMamba") == 2


def dots(axis):
    """{(x, y): area} of a picture's dots."""
    return dict(zip(map(tuple, axis.collections[0].get_offsets().tolist()), axis.collections[0].get_sizes()))


def test_the_scores_are_dots_at_human_and_predicted_score():
    lines = [apa("a", 7, 8), apa("b", 7, 8), apa("c", 0, 0), apa("d", output="x"), apa("e", 10, 9)]
    axis = report.draw_scores(metrics.assessment_rows(lines)).axes[prompts.SCORES.index("total")]
    assert dots(axis) == {(8, 7): 144, (0, 0): 72, (9, 10): 72}


def test_the_confusion_picture_has_a_row_a_heard_phone_and_columns_for_others():
    heard, written = [["IY", "S", "T"], ["IY", "S"]], [["IH", "S"], ["IY", "XX", "Q"]]
    axis = report.draw_confusion(heard, written).axes[0]
    rows = [label.get_text() for label in axis.get_yticklabels()]
    columns = [label.get_text() for label in axis.get_xticklabels()]
    assert rows == ["IY", "T", "S"] and columns == ["IY", "T", "S", "another", "nothing"]
    found = {(columns[int(x)], rows[int(y)]) for x, y in dots(axis)}
    assert found == {("another", "IY"), ("another", "S"), ("nothing", "T")}


# ----------------------------------------------------------------------------------------------------------------------
# Utterances


def test_the_largest_errors_come_first_with_what_became_of_their_phones(page_of):
    # error: a |5 - 5| + 0/4, b |8 - 5| + 1/4, c unparsed 10 + 4/4, d missing 0 + 2/4
    lines = [apa("a"), mdd("a"), apa("b", 8), mdd("b", "W IH S"), apa("c", output="no"), mdd("c", output="{")]
    lines.append(mdd("d", "W IY S T"))
    page = page_of(lines)
    shown = re.findall(r"<span>(\w), error ([\d.]+), PER ([\d.-]+)</span>", page)
    assert shown == [("c", "11.00", "1.000"), ("b", "3.25", "0.250"), ("d", "0.50", "0.500"), ("a", "0.00", "0.000")]
    marked = '<li class="false-alarm" title="false alarm"><b>IY</b><b>IY</b><b>T</b><i>!</i></li>'
    assert marked in page and '<li class="miss" title="miss"><b>IY</b><b>IH</b><b>IY</b><i>?</i></li>' in page


def test_forty_utterances_are_shown_and_only_their_recordings_are_read(page_of):
    read = []
    known = [utterance(str(i), recording=lambda i=i: read.append(i) or b"RIFF") for i in range(45)]
    lines = [apa(str(i), total=i % 5, human=0 if i else 10) for i in range(45)]
    page = page_of(lines, known)
    assert page.count('<details class="error"') == page.count("<audio ") == len(read) == 40
    assert page.count(" open>") == 1 and "<summary>30 more</summary>" in page
    assert read[0] == 0 and not {20, 25, 30, 35, 40} & set(read)  # the last five of eight without error


SILENT = mdd("a", "", reference={"word_transcript": "", "canonical": [], "heard": []})


@pytest.mark.parametrize("lines", [[apa("a")], [apa("a", output="", scores=one_hot(5))], [mdd("a")], [SILENT]])
@pytest.mark.parametrize("known", [[], [utterance("a")]])
def test_a_page_of_one_kind_of_answers_or_of_unreadable_ones_is_made(page_of, lines, known):
    page = page_of(lines, known)
    assert page.count('<details class="error"') == 1 and page.count("<audio ") == len(known)


# ----------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def lines(corpus):
    """What a system that writes the canonical phones answers to the test part of the corpus."""
    return copying(data.read_corpus(corpus, "test", 6))


def test_a_runs_page_has_all_tables_and_its_recordings_and_replaces_nothing(monkeypatch, corpus, lines, tmp_path):
    """The corpus is the one that was evaluated."""
    run = evaluated(tmp_path, lines, data=str(corpus))
    (run / "scores.png").touch()
    with pytest.raises(cli.InputError, match="scores.png is there already"):
        call(monkeypatch, report, run)
    assert not (run / "report.html").exists()
    (run / "scores.png").unlink()
    (tmp_path / "settings.json").write_text('{"rank": 16}')
    for _ in range(2):  # its own page is replaced
        call(monkeypatch, report, run)
    page = (run / "report.html").read_text(encoding="utf-8")
    captions = ["Table 3", "Mean error", "Ranks and spread", "Detection", "p-values", "Phones", "Phones heard"]
    places = [re.search(f"<caption>{caption}", page).start() for caption in captions]
    assert places == sorted(places) and page.count("<audio ") == 6 and "&#34;rank&#34;: 16" in page
    for floor in ("canonical phones", "writes nothing", "pauses and energy"):
        assert f'<th scope="row">{floor}</th>' in page
    assert all((run / picture).read_bytes().startswith(b"\x89PNG") for picture in report.PICTURES)


def test_a_page_without_its_corpus_has_no_recordings_unless_the_user_named_it(monkeypatch, corpus, lines, tmp_path):
    run = evaluated(tmp_path / "out", lines, data=str(tmp_path / "gone"))
    page = tmp_path / "page" / "report.html"
    call(monkeypatch, report, run, "--output", page.parent)
    assert "<audio " not in page.read_text() and "Without recordings" in page.read_text()
    with pytest.raises(cli.InputError, match="gone"):
        call(monkeypatch, report, run, "--data", tmp_path / "gone")
    with pytest.raises(cli.InputError, match="--split"):
        call(monkeypatch, report, run, "--data", corpus, "--split", "train")
    shutil.copytree(corpus, tmp_path / "corpus", ignore=shutil.ignore_patterns("train"))
    call(monkeypatch, report, run, "--output", page.parent, "--data", tmp_path / "corpus")
    assert page.read_text().count("<audio ") == 6 and "Without floors of the scores" in page.read_text()


LONG = [
    line
    for i in range(45)
    for line in (apa(f"{i}", i * 3 % 10, i % 10, speaker=f"{i % 9}"), mdd(f"{i}", "W IH S IY " * (i % 4), speaker="0"))
] + [apa("long", output="x" * 900, speaker="0"), mdd("long", "W " * 60, text="W" * 300, speaker="0")]


@pytest.mark.slow
def test_in_a_browser_and_on_paper_nothing_is_cut_and_recordings_play(tmp_path, page_of, chromium):
    from PIL import Image

    (tmp_path / "report.html").write_text(page_of(LONG, [utterance("long")], label="A" * 80), encoding="utf-8")
    browser = chromium("autoplay-policy=no-user-gesture-required")
    white, black = (255, 255, 255), (0x14, 0x17, 0x1B)
    for width, media, mode, back in (
        (1280, "screen", "light", white),
        (400, "screen", "dark", black),
        (700, "print", "dark", white),
    ):
        screen = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        feature = {"name": "prefers-color-scheme", "value": mode}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [feature]})
        browser.get((tmp_path / "report.html").as_uri())
        if media == "screen":  # on paper all is unfolded
            browser.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")
        heights = "return [...document.querySelectorAll('details table')].map((t) => t.getBoundingClientRect().height)"
        assert min(browser.execute_script(heights)) > 20
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        picture = Image.open(io.BytesIO(browser.find_element("css selector", "img").screenshot_as_png)).convert("RGB")
        assert max(picture.getcolors(1 << 20))[1] == back
    played = browser.execute_async_script("""
        const [done] = arguments, clip = document.querySelector("audio");
        clip.addEventListener("timeupdate", () => clip.currentTime > 0 && done(clip.currentTime));
        clip.addEventListener("error", () => done(clip.error.message));
        clip.play().catch((error) => done(String(error)));""")
    assert isinstance(played, float) and 0 < played <= 1
    assert [json.dumps(entry) for entry in browser.get_log("browser")] == []
