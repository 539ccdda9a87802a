"""Lines of a predictions file, for tests."""

import json

import data
import prompts


def records(count=6, speakers=None):
    """Predictions of a system that is one point off in accuracy and misses the last phone.

    speakers: how many take turns; without it the lines name none.
    """
    lines = []
    for i in range(count):
        spoken = {"speaker": f"s{i % speakers}"} if speakers else {}
        scores = {"accuracy": i % 10, "fluency": 9 - i % 10, "prosodic": 5, "total": i % 3}
        output = prompts.apa_target(scores | {"accuracy": i % 10 + 1})
        lines.append({"id": f"u{i}", "task": "APA", "output": output, "reference": scores, "truncated": False} | spoken)
        reference = {"word_transcript": "WE SEE", "canonical": ["W", "IY", "S", "IY"], "heard": ["W", "IH", "S", "IY"]}
        output = prompts.mdd_target("WE SEE", ["W", "IH", "S"])
        answer = {"id": f"u{i}", "task": "MDD", "output": output, "reference": reference, "truncated": i == 0}
        lines.append(answer | spoken)
    return lines


def copying(utterances, scores=None):
    """Predictions of a system that writes the canonical phones, and these scores, or else the human ones."""
    return [
        {"id": u.id, "task": task, "speaker": u.speaker, "output": output, "reference": data.reference(u, task)}
        for u in utterances
        for task, output in (
            ("APA", prompts.apa_target(scores or u.scores)),
            ("MDD", prompts.mdd_target(u.text, u.canonical)),
        )
    ]


def one_hot(value, low=None):
    """Probabilities of the values 0-10 of all four scores: all of it on `value`, or half of it on `low`."""
    probabilities = [0.0] * 11
    for chosen in (value, value if low is None else low):
        probabilities[chosen] += 0.5
    return dict.fromkeys(prompts.SCORES, probabilities)


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
