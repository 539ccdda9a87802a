"""What does a learner see of a recording?

    python -m analysis.listen my.wav --adapter out/ --text "WE CALL IT BEAR"
    python -m analysis.listen --texts recordings.tsv --adapter out/ --json       # lines of file, tab, text
    python -m analysis.listen folder/ --adapter out/                             # without a text

A recording is checked before a model scores it, and the answer is shown word by word. Of the pronunciations that
--pronunciations and the CMU dictionary have of a word, the one that is closest to what was heard counts:

    WE    100%  W IY         w i
    CALL   67%  K AO>AA L    k ɔ>ɑ l      AO was heard as AA
    IT     50%  -IH T        -ɪ t         IH was not heard
    BEAR  100%  B EH R +AH   b ɛ ɹ +ʌ     AH was added
"""

from dataclasses import asdict, dataclass
import gc
import json
from pathlib import Path
import sys

from tyro.conf import Positional

from analysis import assessor
import evaluate
import metrics
import prompts
from support import cli, files, sound

BARS = " ▁▂▃▄▅▆▇█"  # from no probability to that of the most likely score
ANSI = {"same": "32", "substituted": "31", "missing": "31", "added": "33"}  # green, red, red, yellow
NOTED = 0.1  # s of silence that were left out are worth a line
LEGEND = "TH>S: TH was heard as S   -T: T was not heard   +AH: AH was added"


@dataclass(kw_only=True)
class Settings(evaluate.ModelSettings):
    recordings: Positional[tuple[Path, ...]] = ()  # sound files up to 30 s, or folders of them
    text: str | None = None  # what should be said: its words are marked phone by phone
    texts: Path | None = None  # a file with a line for each recording: its name, a tab, what should be said
    pronunciations: tuple[Path, ...] = ()  # of words, before the CMU dictionary's: files of analysis.pronunciations
    json: bool = False  # print the results as JSON, errors too


def recordings_of(settings: Settings) -> list[tuple[Path, str | None]]:
    """(path, text) of each recording. Raises InputError where there is none."""
    if settings.texts:
        if settings.recordings or settings.text is not None:
            raise cli.InputError("--texts names recordings and texts: leave out recordings and --text")
        lines = [line.partition("\t") for line in files.read_text(settings.texts).split("\n") if line.strip()]
        pairs = [(settings.texts.parent / name, text.strip() or None) for name, _, text in lines]
    else:
        found = [sound.sound_files(path) if path.is_dir() else [path] for path in settings.recordings]
        pairs = [(path, settings.text) for paths in found for path in paths]
    if not pairs:
        raise cli.InputError("nothing to listen to: give one or more sound files")
    if settings.pronunciations and not any(text for _, text in pairs):
        raise cli.InputError("--pronunciations are of the words of a text: add --text")
    return pairs


def show(result: assessor.Result | assessor.Refusal, colour: bool) -> str:
    """A result as lines for a terminal; bars stand for the distribution of a score.

    colour: whether marks get ANSI colours besides their signs.
    """
    if isinstance(result, assessor.Refusal):
        return cli.fill(f"error: {result.error}")
    low, high = prompts.SCORE_RANGE
    notes = [result.file, *(f"warning: {warning.message}" for warning in result.warnings)]
    if max(result.trimmed) >= NOTED:
        before, after = result.trimmed
        notes.append(f"left out: {before:.1f} s of silence before speech, {after:.1f} s after")
    lines = [*map(cli.fill, notes), ""]
    if result.scores:
        lines.append(f"{'':10}  expected  most likely  {low}{high:>{high - low}}")
        for name, score in result.scores.items():
            lines.append(f"{name:10}  {score.expected:8.1f}  {score.mode:11}  {_bars(score.distribution)}".rstrip())
    else:
        lines.append("no scores")
    if result.heard:
        phones, ipa = " ".join(result.heard.phones), " ".join(phone or "?" for phone in result.heard.ipa)
        texts = f"words heard   {result.heard.words}", f"phones heard  {phones}", f"in IPA        {ipa}"
        lines += ["", *(cli.fill(text, indent=14) for text in texts)]
    if result.words:
        said = sum(word.ErrorType != "Omission" for word in result.words)
        lines += [f"completeness  {result.completeness:.0%}: {said} of {len(result.words)} words were said", ""]
        rows = [[_mark(phone) for phone in word.phones] for word in result.words]
        arpabet, ipa = ([" ".join(mark[i] for mark in row) for row in rows] for i in (1, 2))
        longest, *widest = (max(map(len, texts)) for texts in ([word.word for word in result.words], arpabet, ipa))
        below = longest + 11 + sum(widest) > cli.width()
        for word, row, text, phones in zip(result.words, rows, arpabet, ipa):
            name = f"{cli.visible(word.word):{longest}}  {word.accuracy:4.0%}  "
            marks = " ".join(f"\x1b[{ANSI[kind]}m{mark}\x1b[0m" if colour else mark for kind, mark, _ in row)
            space = "\n" + " " * len(name) if below else " " * (widest[0] - len(text) + 3)
            lines.append(f"{name}{marks}{space}{phones}")
        lines += ["", LEGEND]
    return "\n".join(lines)


def _bars(distribution):
    most = max(distribution)
    return "".join(BARS[round((len(BARS) - 1) * probability / most)] for probability in distribution)


def _mark(phone):
    """(kind, mark in ARPAbet, mark in IPA) of a phone."""
    kind = metrics.kind_of(phone.canonical, phone.heard)
    form = {"same": "{0}", "substituted": "{0}>{1}", "missing": "-{0}", "added": "+{1}"}[kind]
    return kind, form.format(phone.canonical, phone.heard), form.format(phone.canonical_ipa, phone.heard_ipa or "?")


def main() -> None:
    gc.set_threshold(100_000)  # what is loaded stays: looking for garbage in it took a tenth of the time
    settings = cli.parse(Settings, __doc__)
    try:
        assess = assessor.Assessor(settings, settings.pronunciations)
        if not (assess.evaluation.training and assess.evaluation.training.quantize):
            sys.modules.setdefault("bitsandbytes", None)  # PEFT would load it, with torch's compiler: two seconds
        results = assess(*zip(*recordings_of(settings)))
        failed = [result for result in results if isinstance(result, assessor.Refusal)]
        if len(failed) == len(results):  # no model was loaded
            raise cli.InputError("; ".join(dict.fromkeys(result.error for result in failed)))
    except cli.InputError as error:
        if settings.json:
            print(json.dumps([{"error": str(error), "version": assessor.VERSION}]))
        raise
    if settings.json:  # in ASCII, so that nothing that was heard or named moves a terminal's cursor
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        print("\n\n".join(show(result, sys.stdout.isatty()) for result in results))
    if failed:
        names = ", ".join(result.file for result in failed)
        raise cli.RunError(f"{len(failed)} of {len(results)} recordings cannot be used: {names}")


if __name__ == "__main__":
    cli.run_script("analysis.listen", main)
