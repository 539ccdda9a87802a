"""What the model reads and writes: control tokens, the two prompts, targets, parsing.

One model does two tasks, told apart by a control token (paper 3.1, Table 2):

    APA  automatic pronunciation assessment            four scores, integers 0-10
    MDD  mispronunciation detection and diagnosis      the words, and the phones as they were heard

A sequence (paper, Figure 3) is

    <|user|><|APA|><|audio_1|>PROMPT<|end|><|assistant|>ANSWER<|end|>

The prompts are the paper's, word for word (Appendix 7.1 and 7.2). They print their output format with single quotes,
which is not JSON, and the MDD example holds an apostrophe; the answers trained on are real JSON with the same keys in
the same order (our choice), and the parser reads both.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
import hashlib
import json
import re

TASKS = ("APA", "MDD")
CONTROL_TOKENS = {"APA": "<|APA|>", "MDD": "<|MDD|>"}  # paper 4.2
AUDIO = "<|audio_1|>"  # where the audio embeddings go; never tokenised
USER, ASSISTANT, END = TURN_TOKENS = ("<|user|>", "<|assistant|>", "<|end|>")

SCORES = ("accuracy", "fluency", "prosodic", "total")  # paper 4.1; completeness is left out
SCORE_RANGE = (0, 10)
TRANSCRIPTS = ("word_transcript", "phoneme_transcript")
# Characters of an answer: 400 new tokens of about 4 make 1,600. The time to read it grows by the square
LONGEST = 16_000

# Paper, Appendix 7.1
APA_PROMPT = """\
Rate the pronunciation of the audio.

**Accuracy**
Score range: 0 - 10
* 9-10: The overall pronunciation of the sentence is excellent, with accurate phonology and no obvious pronunciation mistakes
* 7-8: The overall pronunciation of the sentence is good, with a few pronunciation mistakes
* 5-6: The overall pronunciation of the sentence is understandable, with many pronunciation mistakes and accent, but it does not affect the understanding of basic meanings
* 3-4: Poor, clumsy and rigid pronunciation of the sentence as a whole, with serious pronunciation mistakes
* 0-2: Extremely poor pronunciation and only one or two words are recognizable

**Fluency**
Score range: 0 - 10
* 8-10: Fluent without noticeable pauses or stammering
* 6-7: Fluent in general, with a few pauses, repetition, and stammering
* 4-5: The speech is a little disfluent, with many pauses, repetition, and stammering
* 0-3: Intermittent, very disfluent speech, with lots of pauses, repetition, and stammering

**Prosodic**
Score range: 0 - 10
* 9-10: Correct intonation at a stable speaking speed, speak with cadence, and can speak like a native
* 7-8: Nearly correct intonation at a stable speaking speed, nearly smooth and coherent, but with little stammering and few pauses
* 5-6: Unstable speech speed, many stammering and pauses with a poor sense of rhythm
* 3-4: Unstable speech speed, speak too fast or too slow, without the sense of rhythm
* 0-2: Poor intonation and lots of stammering and pauses, unable to read a complete sentence

**Total**
Score range: 0 - 10
Provide an overall assessment of the pronunciation quality considering all aspects of the speech. This should reflect your holistic evaluation of the speaker's pronunciation abilities based on the entire audio sample.
* 9-10: Excellent overall pronunciation that sounds nearly native-like
* 7-8: Good pronunciation with minor issues that don't affect comprehension
* 5-6: Fair pronunciation with noticeable non-native features but generally understandable
* 3-4: Poor pronunciation that requires effort to understand
* 0-2: Very poor pronunciation that is largely incomprehensible

Provide the results in the following JSON format:
{'accuracy': ACCURACY_SCORE, 'fluency': FLUENCY_SCORE, 'prosodic': PROSODIC_SCORE, 'total': TOTAL_SCORE}"""

# Paper, Appendix 7.2
MDD_PROMPT = """\
Transcribe the audio utterance, providing both a word-level transcript and phoneme-level breakdown.

For the phoneme breakdown, use the CMU Pronouncing Dictionary format (e.g., AA, IH).
If a word or phoneme is unclear, mark it with '<unk>'.

Provide the results in the following JSON format:
{'word_transcript': 'That's an interesting observation.', 'phoneme_transcript': 'DH EH S AX N IH N T AX R EH S T IH NG AA B Z AX R V EY IH SH AX N'}"""

PROMPTS = {"APA": APA_PROMPT, "MDD": MDD_PROMPT}


def build_prompt(task: str, control_token: bool = True) -> str:
    """The text before the answer, up to and including `<|assistant|>` (paper, Figure 3).

    Without `control_token` it is the prompt of the unmodified model, the paper's epoch 0 (paper 3.1).
    """
    token = CONTROL_TOKENS[task] if control_token else ""
    return f"{USER}{token}{AUDIO}{PROMPTS[task]}{END}{ASSISTANT}"


def digest() -> str:
    """Of both prompts with their tokens: what an adapter was trained with, so that no other asks it in silence."""
    return hashlib.sha256("\0".join(map(build_prompt, TASKS)).encode()).hexdigest()


def apa_target(scores: Mapping[str, float]) -> str:
    """The APA answer: JSON with the four scores in fixed order. `scores`: mapping with the names in SCORES."""
    return json.dumps({name: scores[name] for name in SCORES})


def mdd_target(text: str, heard: Iterable[str]) -> str:
    """The MDD answer: JSON with the sentence and the phones as they were heard, separated by spaces."""
    return json.dumps(dict(zip(TRANSCRIPTS, (text, " ".join(heard)))), ensure_ascii=False)


def parse_output(task: str, text: str) -> dict | None:
    """What an output says by key, as numbers (APA) or strings (MDD), or None.

    Accepts double or single quotes, text around the object, apostrophes inside single quotes, scores written as
    strings or floats. Anything that would need a guess is None: a missing key, a score outside 0-10, an answer that
    was cut off inside a value, two answers that differ, a text longer than LONGEST.
    """
    if len(text) > LONGEST:
        return None
    keys, convert = (SCORES, _score) if task == "APA" else (TRANSCRIPTS, _transcript)
    objects, rest = _json_objects(text, keys)
    answers = [{key: convert(found[key]) for key in keys} for found in objects + _quoted_values(rest, keys)]
    agreed = answers and None not in answers[0].values() and all(answer == answers[0] for answer in answers)
    return answers[0] if agreed else None


def _score(value):
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
        value = float(value)
    low, high = SCORE_RANGE
    return value if type(value) in (int, float) and low <= value <= high else None


def _transcript(value):
    """The text, or None; JSON can write half of a surrogate pair, which is no character and fits no file."""
    return value if isinstance(value, str) and not re.search("[\ud800-\udfff]", value) else None


def _json_objects(text, keys):
    """The JSON objects that have all the keys, in a list, and the text without them."""
    decoder = json.JSONDecoder(object_pairs_hook=_unambiguous)
    for brace in re.finditer(r"\{", text):
        with suppress(ValueError, RecursionError):
            found, end = decoder.raw_decode(text, brace.start())
            if found.keys() >= set(keys):
                others, rest = _json_objects(text[end:], keys)
                return [found, *others], text[: brace.start()] + rest
    return [], text


def _unambiguous(pairs):
    """A JSON object; a key that is given two values counts as None."""
    values = {}
    for key, value in pairs:
        values[key] = value if values.get(key, value) == value else None
    return values


def _quoted_values(text, keys):
    """The values of an object that is not JSON (single quotes, no opening brace), in a list; none where a key is missing.

    A string ends at its quote only where another key or the closing brace follows, so apostrophes stay inside; a
    number must be followed by a comma or the brace: "1" may have been about to become "10", or "8" to become "8 or 9".
    """
    string = r"(['\"])([^\\]*?)\2(?=\s*(?:,\s*['\"]\w+['\"]\s*:|\}))"
    number = r"(\d+(?:\.\d+)?)(?=\s*[,}])"
    found = [re.findall(rf"(['\"]){key}\1\s*:\s*(?:{string}|{number})", text, re.DOTALL) for key in keys]
    values = [{text or digits for *_, text, digits in matches} for matches in found]
    return [{key: v.pop() if len(v) == 1 else None for key, v in zip(keys, values)}] if all(values) else []
