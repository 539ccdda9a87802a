"""The page: what it shows, that nothing in it runs or is loaded from elsewhere, and what it may replace."""

import base64
import hashlib
from html.parser import HTMLParser
import io
import json
import math
import os
from pathlib import Path
import re
import shutil
from types import SimpleNamespace
from xml.etree import ElementTree

from conftest import sound, tone
from hypothesis import given
from hypothesis.strategies import lists, sampled_from
import pytest
from records import one_hot, write

from analysis import errors, floors, pictures, report, standing
import data
import evaluate
import metrics
import prompts
from support import cli, predictions

ATTACK = "</script><img src=x onerror=alert(1)>\"'&"


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


def evaluated(folder, lines, label="epoch-3"):
    """A folder as evaluate.py leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({"evaluated": label, "utterances": len(lines) // 2}))
    write(folder / "predictions.jsonl", lines)
    return folder


@pytest.fixture
def page_of(tmp_path):
    """Makes the page of some lines, whose corpus is not known but for `utterances`."""

    def make(lines, utterances=None, label="epoch-3"):
        run = evaluated(tmp_path / "of-lines", lines, label)
        os.utime(run / "predictions.jsonl", (0, 0))
        rows = evaluate.rows_of(lines, label, ("lora", 3))
        known = [evaluate.copying_floor(lines), floors.silent_row(lines)]
        read = report.Evaluated(evaluate.Evaluation(label, run), lines, utterances or {}, rows, known, [])
        return report.make_page(report.Settings(run), read, "python <again>")[0]

    return make


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


def sections(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_the_sections_stand_in_their_order_and_in_the_contents(page_of):
    page = page_of([apa("a"), mdd("a")])
    shown = ["This run", "Scores", "Phones", "Largest errors", "All numbers", "This page again"]
    assert sections(page) == shown and "Calibration" not in page
    assert re.findall(r'<a href="#\w+">(.*?)</a>', page) == shown
    assert "Calibration of the expected scores" in page_of([apa("a", scores=one_hot(5)), mdd("a")])
    assert sections(page_of([apa("a")])) == [name for name in shown if name != "Phones"]
    assert sections(page_of([mdd("a")])) == [name for name in shown if name != "Scores"]
    assert "<pre>python &lt;again&gt;</pre>" in page


def test_the_first_picture_and_its_sentence_come_before_every_table(page_of):
    page = page_of([apa("a"), mdd("a")])
    places = [page.index(mark) for mark in ('class="lead"', "<nav", "data:image/svg+xml", "<table")]
    assert places == sorted(places)


def test_text_of_models_and_corpus_is_text(page_of):
    lines = [apa(ATTACK), mdd(ATTACK, phones=ATTACK, text=ATTACK), apa("b", output=ATTACK), mdd("b", output=ATTACK)]
    lines.append(apa("c", output="half a surrogate pair: \ud83d"))
    reference = {"word_transcript": ATTACK, "canonical": ["$"], "heard": ["$\\frac$", "\x00", "<b>", "\ud83d"]}
    lines.append(mdd("d", phones="$_$ \x01", reference=reference))
    page = page_of(lines, {ATTACK: utterance(ATTACK, text=ATTACK)}, label=ATTACK)
    elements = Elements(page)
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in elements.named("img"))
    assert len(elements.named("script")) == 1 and not elements.named("b>")
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    assert page.lower().count("</script>") == 1
    assert page.count("&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;&#34;&#39;&amp;") >= 10
    for source in re.findall(r"svg\+xml;base64,([\w+/=]+)", page):
        ElementTree.fromstring(base64.b64decode(source))  # raises where it is not XML


def test_nothing_is_loaded_from_elsewhere(page_of):
    page = page_of([apa("a", scores=one_hot(5)), mdd("a")], {"a": utterance("a")})
    elements = Elements(page)
    sources = [
        value
        for _, attributes in elements.found
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action") and not value.startswith("#")
    ]
    assert len(sources) == 5 and all(source.startswith("data:") for source in sources)
    assert sum(source.startswith("data:audio/wav;base64,UklGR") for source in sources) == 1
    assert not elements.named("link") and "url(" not in page and "@import" not in page
    assert "://" not in re.sub(r"base64,[\w+/=]+", "", page)
    (policy,) = [meta["content"] for meta in elements.named("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:; style-src 'sha256-")
    assert "unsafe" not in policy and "*" not in policy


def test_the_same_files_give_the_same_page(page_of):
    lines = [apa("a", scores=one_hot(5)), mdd("a", "W IY S")]
    assert page_of(lines) == page_of(lines)


def test_an_interval_stands_in_the_cell_of_its_number(page_of):
    lines = [line for i in range(6) for line in (apa(f"{i}", i, i, speaker=f"{i}"), mdd(f"{i}", speaker=f"{i}"))]
    page = page_of(lines)
    assert '<tr class="own"><th scope="row">this run, epoch-3</th>' in page
    assert "<td>1.000 <small>[1.00, 1.00]</small></td>" in page and '<th scope="row">  95%' not in page


# ----------------------------------------------------------------------------------------------------------------------
# Where a run stands


def row(label="this run", intervals=(), **numbers):
    numbers = dict.fromkeys(standing.NUMBERS, math.nan) | numbers
    return evaluate.Row(label, ("lora", 3), numbers, dict(intervals))


FLOORS = [row("copying", per=0.3, detection_f1=0.0), row("silence", per=1.0, detection_f1=0.5, accuracy_pcc=0.6)]


@pytest.mark.parametrize(
    "key, value, interval, verdict",
    [
        ("accuracy_pcc", 0.7, (0.61, 0.8), "better"),
        ("accuracy_pcc", 0.7, (0.59, 0.8), "unclear"),
        ("accuracy_pcc", 0.55, (0.5, 0.65), "not better"),
        ("accuracy_pcc", 0.7, None, "better"),
        ("accuracy_pcc", 0.6, None, "not better"),
        ("accuracy_pcc", math.nan, None, ""),
        ("fluency_pcc", 0.7, None, ""),  # no floor
        ("detection_f1", 0.4, None, "not better"),  # than flagging everything
        ("per", 0.2, (0.1, 0.29), "better"),
        ("per", 0.2, (0.1, 0.31), "unclear"),
        ("per", 0.4, (0.35, 0.5), "not better"),
    ],
)
def test_a_number_is_better_than_its_floor_when_its_whole_interval_is(key, value, interval, verdict):
    run = row(intervals={key: interval} if interval else {}, **{key: value})
    (found,) = [s for s in standing.standings(run, FLOORS, False) if s.key == key]
    assert found.verdict == verdict


@pytest.mark.parametrize(
    "numbers, intervals, sentence, summary",
    [
        (
            {"accuracy_pcc": 0.79, "per": 0.4},
            {"accuracy_pcc": (0.72, 0.85)},
            "Accuracy PCC 0.79 [0.72, 0.85], above the floor of 0.60.",
            "Better than their floors: accuracy; unclear: none; not better: PER.",
        ),
        (
            {"accuracy_pcc": 0.65},
            {"accuracy_pcc": (0.5, 0.7)},
            "Accuracy PCC 0.65 [0.50, 0.70], not clearly above the floor of 0.60: the interval holds it.",
            "Better than their floors: none; unclear: accuracy; not better: none.",
        ),
        (
            {"accuracy_pcc": 0.5},
            {},
            "Accuracy PCC 0.50, not above the floor of 0.60.",
            "Better than their floors: none; unclear: none; not better: accuracy.",
        ),
        ({"fluency_pcc": 0.5}, {}, "Fluency PCC 0.50; its floor is not known.", ""),
        (
            {"per": 0.2},
            {},
            "PER 0.20, below the floor of 0.30.",
            "Better than their floors: PER; unclear: none; not better: none.",
        ),
        ({}, {}, "Nothing could be scored.", ""),
    ],
)
def test_the_sentence_says_plainly_whether_the_number_is_above_its_floor(numbers, intervals, sentence, summary):
    found = standing.standings(row(intervals=intervals, **numbers), FLOORS, False)
    assert standing.sentence(found) == sentence and standing.summary(found) == summary


def test_the_papers_numbers_stand_beside_its_own_corpus_alone(page_of, monkeypatch):
    lines = [apa("a"), mdd("a"), apa("b", 9, 9), mdd("b"), apa("c", 1, 1), mdd("c")]
    monkeypatch.setitem(evaluate.PAPER, ("lora", 3), (0.5, 0.5, 0.5, 0.98, 0, 0, 0.9, 0.9, 0.9))
    page = page_of(lines)
    assert "are left out: they are on the 2,500" in page
    assert not re.search(r"paper, lora|HMamba|\*</td>|\*:", page)
    ids = hashlib.sha256(b"a\nb\nc").hexdigest()
    monkeypatch.setattr(evaluate, "PAPER_CORPUS", ids)
    page = page_of(lines)
    assert "paper, lora, epoch 3" in page and "HMamba" in page and "<td>1.000*</td>" in page
    assert not evaluate.is_papers_corpus(lines[:-1] + [mdd("d")])


def test_flagging_everything_is_a_floor_of_detection():
    lines = [mdd("a"), mdd("b")]
    silent = floors.silent_row(lines)
    assert silent.numbers["per"] == 1 and silent.numbers["detection_recall"] == 1
    assert silent.numbers["detection_f1"] == pytest.approx(2 * 0.25 / 1.25)  # one phone of four is mispronounced


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def drawn(axis, color):
    """The dots of a color in a picture, as a set of (x, y)."""
    lines = [line for line in axis.get_lines() if line.get_color() == color and line.get_marker() == "o"]
    return {(x, y) for line in lines for x, y in line.get_xydata().tolist()}


def test_the_scores_are_dots_at_human_and_predicted_score():
    lines = [apa("a", 7, 8), apa("b", 7, 8), apa("c", 0, 0), apa("d", output="x"), apa("e", 10, 9)]
    axis = pictures.draw_scores(metrics.paired(lines)[0]).axes[prompts.SCORES.index("total")]
    assert drawn(axis, pictures.BLUE) == {(8, 7), (0, 0), (9, 10)}
    sizes = {
        tuple(line.get_xydata()[0]): line.get_markersize() for line in axis.get_lines() if line.get_marker() == "o"
    }
    assert sizes[8, 7] == pictures.LARGEST > sizes[0, 0] > 0
    assert "total\nPCC 0.9" in axis.get_title()


def test_the_confusion_picture_has_a_row_for_each_heard_phone_and_columns_for_others_and_nothing():
    heard, written = [["IY", "S", "T"], ["IY", "S"]], [["IH", "S"], ["IY", "XX", "Q"]]
    axis = pictures.draw_confusion(heard, written).axes[0]
    rows, columns = (
        [label.get_text() for label in labels] for labels in (axis.get_yticklabels(), axis.get_xticklabels())
    )
    assert rows == ["IY", "T", "S"] and columns == ["IY", "T", "S", "another", "nothing"]
    dots = {(columns[int(x)], rows[int(y)]) for x, y in drawn(axis, pictures.ORANGE)}
    assert dots == {("another", "IY"), ("another", "S"), ("nothing", "T")}
    assert "100%" in axis.get_title()


def test_a_picture_of_the_page_follows_light_and_dark():
    svg = pictures.to_svg(pictures.draw_scores([])).decode()
    assert "prefers-color-scheme: dark" in svg and "var(--1f77b4)" not in svg  # there is no dot
    svg = pictures.to_svg(pictures.draw_confusion([["S"]], [["T"]])).decode()
    styles = svg.split("</style>", 1)[1]
    assert "var(--ff7f0e)" in styles and not set(re.findall(r": (#\w{6})", styles)) & pictures.DARK.keys()


# ----------------------------------------------------------------------------------------------------------------------
# Utterances


def test_the_largest_errors_come_first(page_of):
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
    assert {answer.id: answer.error for answer in errors.read_answers(lines)} == {
        "a": 0,
        "b": 3.25,
        "c": 11,
        "d": 0.5,
        "e": 1.5,
    }
    assert re.findall(r"<span>(\w), error ([\d.]+), PER ([\d.-]+)</span>", page_of(lines)) == [
        ("c", "11.00", "1.000"),
        ("b", "3.25", "0.250"),
        ("e", "1.50", "-"),
        ("d", "0.50", "0.500"),
        ("a", "0.00", "0.000"),
    ]


def test_forty_utterances_are_shown_and_only_their_recordings_are_read(page_of):
    read = []
    known = {str(i): utterance(str(i), recording=lambda i=i: read.append(i) or clip()) for i in range(45)}
    lines = [apa(str(i), total=i % 5, human=0 if i else 10) for i in range(45)]
    page = page_of(lines, known)
    assert page.count('<details class="error"') == page.count("<audio ") == len(read) == 40
    assert page.count(" open>") == 1 and "<summary>30 more</summary>" in page
    assert read[0] == 0 and not {20, 25, 30, 35, 40} & set(read)  # the last five of eight without error


@pytest.mark.parametrize(
    "canonical, heard, written, columns",
    [
        ("W IY", "W IY", "W IY", "W/W/W right, IY/IY/IY right"),
        ("W IY", "W IY", "W IH", "W/W/W right, IY/IY/IH false alarm"),
        ("W IY", "W IY", "W", "W/W/W right, IY/IY/- false alarm"),
        ("W IY", "W IH", "W IY", "W/W/W right, IY/IH/IY miss"),
        ("W IY", "W IH", "W IH", "W/W/W right, IY/IH/IH found"),
        ("W IY", "W IH", "W EH", "W/W/W right, IY/IH/EH found, as another phone"),
        ("W IY T", "W IY", "W IY T", "W/W/W right, IY/IY/IY right, T/-/T miss"),
        ("W IY T", "W IY", "W IY", "W/W/W right, IY/IY/IY right, T/-/- found"),
        ("W", "W T", "W T", "W/W/W right, -/T/T found"),
        ("W", "W T", "W", "W/W/W right, -/T/- miss"),
        ("W", "W", "W T", "W/W/W right, -/-/T added, counts in the PER alone"),
        ("W IY", "W IY", "", "W/W/- false alarm, IY/IY/- false alarm"),
    ],
)
def test_a_false_alarm_can_be_told_from_a_miss(canonical, heard, written, columns):
    found = errors.phone_columns(canonical.split(), heard.split(), written.split())
    assert ", ".join("/".join(phone or "-" for phone in column[:3]) + f" {column[3]}" for column in found) == columns


@given(*[lists(sampled_from("ABC"), max_size=6)] * 3)
def test_the_columns_hold_every_phone_and_count_what_detection_counts(canonical, heard, written):
    columns = errors.phone_columns(canonical, heard, written)
    for side, phones in enumerate((canonical, heard, written)):
        assert [column[side] for column in columns if column[side]] == phones
    (events,) = metrics.detection_events([canonical], [heard], [written])
    kinds = [kind for _, phone, _, kind in columns if phone]
    names = {
        "right": "true_accept",
        "false alarm": "false_reject",
        "miss": "false_accept",
        "found": "correct_diagnosis",
    }
    assert [names.get(kind, "diagnosis_error") for kind in kinds] == events[: len(heard)]  # of what was said


def test_calibration_bins_are_one_point_wide_and_the_last_one_holds_ten(page_of):
    bins = pictures.calibration_bins([0.0, 7.0, 7.5, 7.999, 8.0, 9.5, 10.0], [1, 6, 7, 8, 9, 10, 9])
    assert list(bins) == [0, 7, 8, 9]
    assert bins[0] == (1, 0, 1) and bins[8] == (1, 8, 9) and bins[9] == (2, 9.75, 9.5)
    assert bins[7] == (3, pytest.approx(22.499 / 3), 7)
    page = page_of([apa("a", human=8, scores=one_hot(7, 6)), apa("b")])
    assert '<th scope="row">total, 6 to 7</th><td>1</td><td>6.50</td><td>8.00</td></tr>' in page


def test_unparsed_outputs_are_named_and_cut(page_of):
    page = page_of([apa("a", output="x" * 1000, truncated=True), mdd("a", output="WE <unk>")])
    assert "APA output, unparsed</b>, cut off at the length limit (the first 400 of 1,000 characters)" in page
    assert f"<pre>{'x' * 400}</pre>" in page and "x" * 401 not in page
    assert "MDD output, unparsed</b> (8 characters):</p>\n<pre>WE &lt;unk&gt;</pre>" in page
    assert "unparsed answers, 100.0%, are left out" in page


@pytest.mark.parametrize(
    "records",
    [
        [apa("a")],
        [mdd("a")],
        [apa("a", output=""), mdd("a", output="")],
        [mdd("a", phones="", reference={"word_transcript": "", "canonical": [], "heard": []})],
    ],
)
@pytest.mark.parametrize("known", [{}, {"a": utterance("a")}])
def test_what_is_missing_is_said_and_nothing_fails(page_of, records, known):
    page = page_of(records, known)
    assert page.count('<details class="error"') == len({record["id"] for record in records})
    assert page.count("<audio ") == bool(known)
    assert ("No MDD answer" in page) == (records == [apa("a")])


def gone():
    raise FileNotFoundError(2, "No such file or directory", "<gone>.wav")


@pytest.mark.parametrize(
    "recording, shown",
    [
        (gone, "cannot be read: [Errno 2] No such file or directory: '<gone>.wav'"),
        (lambda: b"", "of a type that is not played here"),
        (lambda: b"RIFF\0\0\0\0AVI ", "of a type that is not played here"),
        (lambda: b"RIFF\n\0\0\0WAVEfmt ", "audio/wav"),
        (lambda: b"fLaC\0", "audio/flac"),
        (lambda: b"OggS\0", "audio/ogg"),
        (lambda: b"ID3\4", "audio/mpeg"),
        (lambda: b"\xff\xfb\x90", "audio/mpeg"),
    ],
)
def test_a_recording_is_played_by_its_type_or_the_reason_is_given(recording, shown):
    audio, reason = errors.read_audio(utterance("a", recording=recording))
    assert shown in (reason if audio is None else audio[0])


# ----------------------------------------------------------------------------------------------------------------------
# The command


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
    captions = ["Six numbers", "Detection", "Phones", "Phones heard", "Table 3", "Mean error"]
    places = [re.search(f"<caption>{caption}", page).start() for caption in captions]
    assert places == sorted(places)
    assert page.count("<audio ") == 6
    for floor in ("says everything right", "writes nothing", "pauses and energy"):
        assert f'<th scope="row">{floor}</th>' in page
    assert f"<pre>python -m analysis.report {tmp_path / 'out' / folder}</pre>" in page
    for picture in report.PICTURES:
        assert (tmp_path / "out" / folder / picture).read_bytes().startswith(b"\x89PNG")


def test_the_head_names_model_data_seed_settings_and_the_date_of_the_answers(monkeypatch, corpus, lines, tmp_path):
    run = evaluated(tmp_path / "out", lines)
    trained_on(run, corpus, seed=7, rank=16, data_revision="c0ffee", model="given/model", revision="of-training")
    make(monkeypatch, run)
    os.utime(run / "predictions.jsonl", (86_400, 86_400))

    def head():
        make(monkeypatch, run)
        page = (run / "report.html").read_text(encoding="utf-8")
        return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)), page

    facts, page = head()
    assert facts == {
        "model": "given/model at of-training",
        "data": f"{corpus} at c0ffee (test), 6 utterances of 1 speakers",
        "training": "strategy unfreeze, rank 16, seed 7",
        "answers": "not known",
        "answered": "1970-01-02 00:00 UTC",
    }
    assert "&#34;rank&#34;: 16" in page
    how = {"model": "other/model", "revision": "beef", "dtype": "bfloat16", "max_new_tokens": 80}
    (run / "predictions.settings.json").write_text(json.dumps(how))
    facts, _ = head()
    assert facts["model"] == "other/model at beef" and facts["answers"] == "dtype bfloat16, max_new_tokens 80"


def test_the_curve_of_the_training_is_in_the_page_of_its_folder(monkeypatch, lines, tmp_path):
    run = evaluated(tmp_path / "out", lines)
    make(monkeypatch, run)
    assert "Learning curve" not in (run / "report.html").read_text()
    write(run / "log.jsonl", [{"step": i, "loss": 1 / i, "learning_rate": 0.1} for i in (1, 2, 3)])
    make(monkeypatch, run)
    assert "Learning curve" in sections((run / "report.html").read_text())
    (run / "log.jsonl").write_text("{}\n")
    with pytest.raises(cli.InputError, match="line 1 of .*log.jsonl: step is missing"):
        make(monkeypatch, run)


def test_a_corpus_without_a_train_part_has_recordings_and_no_floor_of_the_scores(
    monkeypatch, corpus, lines, tmp_path, capsys
):
    shutil.copytree(corpus, tmp_path / "corpus")
    shutil.rmtree(tmp_path / "corpus" / "train")
    run = evaluated(tmp_path / "out", lines)
    make(monkeypatch, run, "--data", tmp_path / "corpus")
    page = (run / "report.html").read_text()
    assert page.count("<audio ") == 6 and "Without floors of the scores" in page
    assert "Without floors of the scores" in capsys.readouterr().out


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
        ("report.html", lambda path: path.write_text("<!DOCTYPE html>mine"), "is not of a report"),
        ("report.html", lambda path: path.write_bytes(bytes(range(256))), "is not of a report"),
        ("report.html", lambda path: path.write_text("x" * 5000 + report.GENERATOR), "is not of a report"),
        ("report.html", lambda path: path.symlink_to("nowhere"), "report.html cannot be read"),
        ("report.html", os.mkfifo, "not a regular file"),
        ("file/report.html", lambda path: path.parent.touch(), "file"),
        ("report.html", lambda path: path.with_name("scores.png").write_bytes(b"\x89PNG mine"), "scores.png is not of"),
        ("report.html", lambda path: path.with_name("confusion.png").symlink_to("nowhere"), "confusion.png cannot be"),
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
def browser(chromium):
    return chromium("autoplay-policy=no-user-gesture-required")


def size(browser, width):
    """Show pages at this width from now on; returns nothing."""
    screen = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def varied(i):
    """Scores of an utterance: all but prosodic, which has no PCC, differ among utterances."""
    return dict.fromkeys(prompts.SCORES, i * 7 % 10) | {"accuracy": i % 10, "fluency": i % 8, "prosodic": 5}


LONG = [
    line
    for i in range(45)
    for line in (
        apa(f"{i}", output=prompts.apa_target(varied(i * 3)), reference=varied(i), speaker=f"{i % 9}"),
        mdd(f"{i}", "W IH S IY " * (i % 4), speaker=f"{i % 9}"),
    )
]


@pytest.mark.slow
def test_in_a_browser_nothing_is_cut_and_long_lists_are_folded(tmp_path, page_of, browser):
    lines = [*LONG, apa("long", output="x" * 900), mdd("long", "W " * 60, text="W" * 300)]
    (tmp_path / "report.html").write_text(page_of(lines, label="A" * 80), encoding="utf-8")
    wider = "return [...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth).length"
    height = "return document.documentElement.scrollHeight"
    for width in (1280, 400, 360):
        size(browser, width)
        browser.get((tmp_path / "report.html").as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script(height) < (6000 if width == 1280 else 8000)
        assert width < 1280 or browser.execute_script(wider) == 0
    browser.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")
    assert browser.execute_script(height) > 16000
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    assert [json.dumps(entry) for entry in browser.get_log("browser")] == []


@pytest.mark.slow
def test_in_a_browser_pictures_are_light_or_dark_as_the_page_is(tmp_path, page_of, browser):
    from PIL import Image

    (tmp_path / "report.html").write_text(page_of(LONG), encoding="utf-8")
    browser.get((tmp_path / "report.html").as_uri())
    for mode, back, text in (("light", (255, 255, 255), (0, 0, 0)), ("dark", (0x14, 0x17, 0x1B), (0xE6, 0xE9, 0xED))):
        feature = {"name": "prefers-color-scheme", "value": mode}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        image = browser.find_element("css selector", "img").screenshot_as_png
        colors = Image.open(io.BytesIO(image)).convert("RGB").getcolors(1 << 20)
        counts = {color: count for count, color in colors}
        assert max(counts, key=counts.get) == back and text in counts


@pytest.mark.slow
def test_in_a_browser_recordings_play_and_sorting_keeps_the_interval_with_its_number(tmp_path, page_of, browser):
    from selenium.webdriver.common.keys import Keys

    (tmp_path / "report.html").write_text(page_of(LONG, {"3": utterance("3")}), encoding="utf-8")
    size(browser, 1280)
    browser.get((tmp_path / "report.html").as_uri())
    played = browser.execute_async_script("""
        const [done] = arguments, clip = document.querySelector("audio");
        clip.addEventListener("timeupdate", () => clip.currentTime > 0 && done(clip.currentTime));
        clip.addEventListener("error", () => done(clip.error.message));
        clip.play().catch((error) => done(String(error)));""")
    assert isinstance(played, float) and 0 < played <= 1

    def rows():
        cells = (
            "return [...document.querySelector('tbody').rows].map((row) => [...row.cells].map((c) => c.textContent))"
        )
        return browser.execute_script(cells)

    before = rows()
    assert [name for name, *_ in before] == list(standing.NUMBERS.values())
    name, run = browser.find_elements("css selector", "table:first-of-type th button")[:2]
    run.click()
    *values, last = [cells[1] for cells in rows()]
    assert last == "-" and all(re.fullmatch(r"-?[\d.]+ \[-?[\d.]+, -?[\d.]+\]", value) for value in values)
    assert values == sorted(values, key=lambda value: float(value.split()[0])) and len(set(values)) > 3
    assert rows() != before and sorted(rows()) == sorted(before)
    run.send_keys(Keys.ENTER)
    assert [cells[1].split()[0] for cells in rows()] == [*(value.split()[0] for value in values[::-1]), "-"]
    name.send_keys(Keys.SPACE)
    assert [cells[0] for cells in rows()] == sorted((cells[0] for cells in before), key=str.lower)
    order = "return [...document.querySelector('thead tr').cells].map((head) => head.getAttribute('aria-sort'))"
    assert browser.execute_script(order)[:3] == ["ascending", None, None]
    assert [json.dumps(entry) for entry in browser.get_log("browser")] == []
