"""When is an answer not to be believed? A model scores noise, too; these are the signs that it did.

A doubt is {"code", "message"}. With a code of FORBIDS there are no scores. The limits come from speechocean762's test
part, with the phones that raters heard; beside each stands what was measured.
"""

from functools import cache

from analysis.pronunciations import VOWELS
from support import sound

CONSONANTS = {"B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N", "NG", "P", "R", "S", "SH", "T", "TH"}
INVENTORY = VOWELS | CONSONANTS | {"V", "W", "Y", "Z", "ZH", "<unk>"}  # of the corpus' labels; a star may follow
FORBIDS = ("no_speech", "too_short", "another_sentence")
NOTHING_HEARD = ("no_speech", "too_short")  # so what the model wrote says nothing

FASTEST = 0.035  # s of speech a phone, half of the least in 500 utterances of the test part (0.070)
# Of the first 1,200 utterances less than 1 % have more marked phones against their own text, and all have against the
# text of another utterance.
OTHER_SENTENCE = 0.5  # share of phones
# Of these none of accuracy 8 or more has a larger share of marked phones than 0.27, and the one below 3 has 0.59.
HIGH, MANY = 8.0, 0.3
LOW = 3.0


@cache
def _detector():
    import silero_vad  # sets torch's threads
    import torch

    threads = torch.get_num_threads()
    model = silero_vad.load_silero_vad()
    torch.set_num_threads(threads)
    return model


def speech_seconds(audio):
    """How much of a recording (S,) is speech, in seconds, by silero-vad.

    3 s of white or pink noise, a tone or a chord have none, of mains hum 0.7 s; of 500 utterances of the test part each
    has 1.08 s or more. webrtcvad takes white noise for speech. The weights are in the package, which needs torch alone.
    """
    import silero_vad
    import torch

    found = silero_vad.get_speech_timestamps(torch.as_tensor(audio), _detector(), sampling_rate=sound.SAMPLE_RATE)
    return sum(part["end"] - part["start"] for part in found) / sound.SAMPLE_RATE


def known_phones(phones):
    """Whether all are phones of the corpus."""
    return all(phone.removesuffix("*") in INVENTORY for phone in phones)


def find(speech, rate, truncated, phones, words, meant, accuracy):
    """The doubts about one answer, a list.

    speech: seconds of it; rate: of the sound file in Hz; truncated: whether the transcript was cut off; phones: heard,
    None where the transcript cannot be read; words: of pronunciations.of_text, None without a text; meant: of
    pronunciations.meant, None without text or phones; accuracy: the expected score.
    """
    doubts = []

    def doubt(code, message):
        doubts.append({"code": code, "message": message})

    count = sum(len(variants[0]) for _, variants in words) if words else len(phones or ())
    if not speech:
        doubt("no_speech", "no speech is heard: check the microphone and record it again")
    elif speech < FASTEST * count:
        doubt("too_short", f"{speech:.2f} s of speech is too short for {count} phones: record the whole sentence")
    if doubts:
        return doubts
    if rate < sound.SAMPLE_RATE:
        doubt("low_rate", f"{rate:,} Hz lacks the upper band, which S, F and TH need: record at 16,000 Hz or more")
    if truncated:
        doubt("transcript_cut_off", "the transcript came to its length limit: what follows is missing")
    if phones is None:
        doubt("transcript_unreadable", "the model's transcript cannot be read")
    if meant:
        kinds = [mark[0] for _, marks in meant for mark in marks]
        share = sum(kind != "same" for kind in kinds) / len(kinds)
        if share > OTHER_SENTENCE:
            doubt("another_sentence", f"{share:.0%} of the phones are not the text's: was another sentence read?")
        elif accuracy >= HIGH and share > MANY or accuracy < LOW and share == 0:
            doubt("contradiction", f"accuracy {accuracy:.1f} and {share:.0%} of marked phones: believe neither")
    return doubts
