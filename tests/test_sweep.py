"""sweep.sh, as a user starts it: three readings, a failure in the middle, and the same line again."""

import os
import subprocess
import sys

from conftest import ROOT
import pytest

from support import run as runs
import tiny

READINGS = ("default", "faster", "continue")


@pytest.mark.slow
def test_a_sweep_ends_at_a_failure_goes_on_from_there_and_ranks_by_validation_loss(checkpoint, tmp_path):
    tiny.write_corpus(tmp_path / "corpus", {"train": 3, "test": 2}, per_speaker=2, seed=0)
    (tmp_path / "my reader.py").write_text("from data import read_folder as read")
    how = f"--model {checkpoint} --data {tmp_path}/corpus --epochs 1 --batch-size 4 --accumulation 1 --data-reader"
    line = [ROOT / "sweep.sh", tmp_path, *how.split(), tmp_path / "my reader.py"]
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    (tmp_path / "faster").mkdir()
    (tmp_path / "faster" / "log.jsonl").write_text("somebody's")

    def sweep():
        return subprocess.run(line, env=os.environ | {"PATH": path}, capture_output=True, text=True)

    refused = sweep()
    assert refused.returncode == 2 and "log.jsonl is there already" in refused.stderr
    assert (tmp_path / "default" / "metrics.json").exists() and not (tmp_path / "continue").exists()
    written = (tmp_path / "default" / "log.jsonl").stat().st_mtime_ns

    (tmp_path / "faster" / "log.jsonl").unlink()
    done = sweep()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "default" / "log.jsonl").stat().st_mtime_ns == written
    losses = {name: runs.adapters(tmp_path / name, "best")[0][1].validation_loss for name in READINGS}
    ranked = done.stdout.splitlines()[-3:]
    assert [line.split("/")[0] for line in ranked] == sorted(READINGS, key=losses.get)
    assert f"Trust {min(READINGS, key=losses.get)}," in done.stdout and done.stdout.count("detection_f1") == 2
