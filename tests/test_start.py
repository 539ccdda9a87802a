"""How a command starts: what needs no model waits for no library."""

from conftest import ROOT, script
import pytest

HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "scipy", "matplotlib", "datasets", "httpx", "jiwer"}
ANALYSIS = [path for path in sorted(ROOT.glob("analysis/*.py")) if "run_script" in path.read_text()]
COMMANDS = [[ROOT / f"{name}.py"] for name in ("train", "evaluate", "tiny")]
COMMANDS += [["-m", f"analysis.{path.stem}"] for path in ANALYSIS]


def imported(result):
    """First names of what a script imported, by `python -X importtime`."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.split("|")[-1].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize("argument, code", [("--help", 0), ("--eport", 2)])
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: getattr(command[-1], "name", command[-1]))
def test_help_and_a_mistyped_flag_wait_for_no_heavy_library(command, argument, code, tmp_path):
    result = script("-X", "importtime", *command, argument, cwd=tmp_path)

    assert result.returncode == code, result.stderr
    assert "--help" in result.stdout if code == 0 else ": error: " in result.stderr
    assert not imported(result) & HEAVY
