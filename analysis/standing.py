"""Where does a run stand: beside what needs no pronunciation, beside the paper, beside what others report?

For analysis.report; `read_floors` of analysis.floors computes the rows that stand for "needs no pronunciation".
"""

from dataclasses import dataclass
import math

import prompts

NUMBERS = {f"{name}_pcc": name for name in prompts.SCORES} | {"detection_f1": "detection F1", "per": "PER"}
LESS_IS_BETTER = {"per"}
# What others report on the same test part, in the order of NUMBERS; F1 is detection, by the field's convention. Those
# with a dagger are given the sentence that should be read, which makes scoring easier and a low PER nearly free:
# copying it has a PER of 0.03. F1 of Joint-CAPT-L1 and HMamba: HMamba, Table 3.
PUBLISHED = {
    "GOPT (2022) \u2020": (0.714, 0.753, 0.760, 0.742, None, None),
    "Joint-CAPT-L1 (2023)": (0.719, 0.775, 0.773, 0.743, 0.415, 0.099),
    "MultiPA (2024)": (0.705, 0.772, 0.763, 0.730, None, None),
    "Qwen2-Audio LoRA (2025)": (0.69, 0.74, 0.73, 0.72, None, None),
    "HMamba (2025) \u2020": (0.807, 0.848, 0.843, 0.829, 0.6385, 0.0272),
}
BEST = "HMamba (2025) \u2020"  # in every number of the list


@dataclass
class Standing:
    """One number of a run and what it is to be compared with; nan where there is no such number."""

    key: str  # of NUMBERS
    value: float
    interval: tuple[float, float]
    floor: float
    floor_of: str  # label of the row that the floor is from
    paper: float
    best: float  # of BEST

    @property
    def name(self):
        return NUMBERS[self.key]

    @property
    def verdict(self):
        """Whether it is better than its floor: "better", "unclear" where the interval holds the floor, "not better".

        Without an interval the number alone decides; without a floor, or a number, there is no verdict: "".
        """
        if math.isnan(self.floor) or math.isnan(self.value):
            return ""
        sign = -1 if self.key in LESS_IS_BETTER else 1
        ends = [sign * (end - self.floor) for end in (self.value, *self.interval) if not math.isnan(end)]
        if ends[0] <= 0:
            return "not better"
        return "better" if min(ends) > 0 else "unclear"


def standings(row, floors, papers_corpus):
    """A Standing for each of NUMBERS. row, floors: of evaluate.Row; a floor is the best number of any floor row.

    papers_corpus: whether the paper's and the published numbers are of these utterances; others are not shown.
    """
    best = dict(zip(NUMBERS, PUBLISHED[BEST])) if papers_corpus else {}
    found = []
    for key in NUMBERS:
        known = [(floor.numbers[key], floor.label) for floor in floors if not math.isnan(floor.numbers[key])]
        floor, floor_of = (min if key in LESS_IS_BETTER else max)(known, default=(math.nan, ""))
        value, interval = row.numbers[key], row.intervals.get(key, (math.nan, math.nan))
        found.append(
            Standing(key, value, interval, floor, floor_of, row.near.get(key, math.nan), best.get(key, math.nan))
        )
    return found


def number(value, interval=(math.nan, math.nan)):
    """A number as text with its interval, as 0.75 [0.65, 0.81]."""
    ends = "" if math.isnan(interval[0]) else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{value:.2f}{ends}"


def sentence(found):
    """The one to know of a run: its first number, and the floor of that. found: of `standings`."""
    shown = [s for s in found if not math.isnan(s.value)]
    if not shown:
        return "Nothing could be scored."
    first = shown[0]
    above = "below" if first.key in LESS_IS_BETTER else "above"
    compared = {
        "better": f", {above} the floor of {first.floor:.2f}.",
        "unclear": f", not clearly {above} the floor of {first.floor:.2f}: the interval holds it.",
        "not better": f", not {above} the floor of {first.floor:.2f}.",
        "": "; its floor is not known.",
    }[first.verdict]
    name = f"{first.name.capitalize()} PCC" if first.name in prompts.SCORES else first.name
    return f"{name} {number(first.value, first.interval)}{compared}"


def summary(found):
    """Which numbers are better than their floors, "" where no floor is known."""
    kinds = {"better": "Better than their floors", "unclear": "unclear", "not better": "not better"}
    names = {kind: [s.name for s in found if s.verdict == kind] for kind in kinds}
    parts = [f"{title}: {', '.join(names[kind]) or 'none'}" for kind, title in kinds.items()]
    return "; ".join(parts) + "." if any(names.values()) else ""
