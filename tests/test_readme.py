import importlib
import re

import pytest
from conftest import ROOT

import evaluate

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "name",
    sorted(set(re.findall(r"`((?:data|evaluate|loader|metrics|model|prompts|tables|train)\.(?!py)\w+)", README))),
)
def test_every_function_the_walkthrough_names_exists(name):
    module, attribute = name.split(".")
    assert hasattr(importlib.import_module(module), attribute)


def test_the_papers_rows_in_the_readme_are_those_the_code_compares_with():
    rows = re.findall(r"^\| paper, (unmodified model|LoRA, epoch (\d)) \| (.*) \|$", README, re.MULTILINE)
    typed = {
        ("lora", int(epoch)) if epoch else ("base", 0): tuple(map(float, cells.split("|"))) for _, epoch, cells in rows
    }
    assert len(typed) == 5 and typed == {key: evaluate.PAPER[key] for key in typed}


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_every_flag_the_readme_shows_is_one_of_the_script(script):
    source = (ROOT / f"{script}.py").read_text()
    for line in re.findall(rf"python {script}\.py (.*)", README):
        for flag in re.findall(r"--[\w-]+", line):
            assert f'"{flag}"' in source


@pytest.mark.parametrize("recipe", ["speech_detection", "gold_transcripts", "sign_language"])
def test_every_flag_that_a_recipes_section_shows_is_one_of_its_script(recipe):
    source = (ROOT / "recipes" / f"{recipe}.py").read_text()
    sections = re.split(r"^## ", (ROOT / "recipes" / "README.md").read_text(), flags=re.MULTILINE)
    (section,) = (section for section in sections if section.startswith(f"{recipe}.py"))
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", section))
    assert len(flags) > 5 and all(f'"{flag}"' in source for flag in flags)
