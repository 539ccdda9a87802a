"""Does the bare checkpoint write what transformers' own test of it expects?

    python -m analysis.golden

Question and answer are those of transformers' integration test of Phi-4-multimodal: text alone, greedy, without the
speech adapter, there in float16. Another answer says that weights, tokenizer or library are not those that were tested.
"""

from dataclasses import dataclass

from support import cli
from support import run as runs
from support.later import when_used

with when_used():
    import torch

    import model as models
    from support import pretrained

QUESTION = "What is the answer for 1+1? Explain it."
ANSWER = "The answer for 1+1 is 2. This is because when you add one to another"
NEW_TOKENS = 20


@dataclass
class Settings:
    """Which checkpoint is asked."""

    model: str = runs.HUB_MODEL  # checkpoint folder or hub id
    revision: str | None = runs.HUB_MODEL_REVISION  # of the hub id
    dtype: runs.Dtype | None = None  # of the weights; not given: bfloat16 on CUDA


def main() -> None:
    """Print the answer. Raises RunError where it is another one."""
    settings = cli.parse(Settings, __doc__)
    checkpoint = pretrained.find(settings.model, settings.revision)
    dtype = settings.dtype or models.default_dtype()
    model = models.load_base(checkpoint, dtype, "sdpa", "none").eval()
    (answer,) = pretrained.ask(model, models.generate, QUESTION, [torch.empty(0)], NEW_TOKENS)  # no recording
    cli.say(f"{checkpoint}, {dtype}: {answer!r}")
    if answer != ANSWER:
        raise cli.RunError(
            f"transformers' own test of this checkpoint expects {ANSWER!r}: compare the commit, and the versions of "
            f"torch and transformers with requirements.txt"
        )
    print("as expected")


if __name__ == "__main__":
    cli.run_script("analysis.golden", main)
