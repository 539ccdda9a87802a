"""How a command starts: what needs no model waits for no library."""

import sys

from conftest import ROOT, script
import pytest

from support import later

HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "scipy", "matplotlib", "datasets", "httpx", "jiwer"}
ANALYSIS = [path for path in sorted(ROOT.glob("analysis/*.py")) if "run_script" in path.read_text()]
COMMANDS = [[ROOT / f"{name}.py"] for name in ("train", "evaluate", "tiny")]
COMMANDS += [["-m", f"analysis.{path.stem}"] for path in ANALYSIS]


def imported(result):
    """First names of what a script imported, by `python -X importtime`."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.split("|")[-1].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: getattr(command[-1], "name", command[-1]))
def test_help_waits_for_no_heavy_library(command, tmp_path):
    result = script("-X", "importtime", *command, "--help", cwd=tmp_path)
    assert result.returncode == 0 and "--help" in result.stdout, result.stderr
    assert not imported(result) & HEAVY


def test_every_command_says_the_version_that_pyproject_declares(tmp_path):
    result = script(ROOT / "train.py", "--version", cwd=tmp_path)
    assert f'version = "{result.stdout.split()[-1]}"\n' in (ROOT / "pyproject.toml").read_text()


def test_an_import_waits_until_it_is_used_and_sees_what_is_put_into_the_module_later(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with later.when_used():
        import colorsys
        from xml import sax

    assert "colorsys" not in sys.modules
    assert colorsys.rgb_to_hsv(0, 0, 1) == (2 / 3, 1, 1) and "colorsys" in sys.modules
    monkeypatch.setattr(sys.modules["colorsys"], "rgb_to_hsv", "another")
    assert colorsys.rgb_to_hsv == "another"
    assert sax.make_parser


def test_an_import_that_would_bind_another_module_than_it_names_is_refused():
    with pytest.raises(ImportError, match="import xml.dom: write `from"), later.when_used():
        import xml.dom  # noqa: F401
    import xml.dom  # noqa: F401  # imports are as before
