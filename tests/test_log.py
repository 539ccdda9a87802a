"""curves.png: what of the log is drawn."""

import pytest
from records import write

from support import cli


def line(step, epoch, **more):
    return {"step": step, "epoch": epoch, "loss": 1 / step, "learning_rate": step / 10, "gradient_norm": 5.0} | more


def shown(axis, label):
    (found,) = [drawn for drawn in axis.get_lines() if drawn.get_label() == label]
    return found.get_xydata().tolist()


def test_the_curves_show_every_step_smoothed_values_epochs_and_validation(tmp_path):
    write(tmp_path / "log.jsonl", [line(step, 1 + (step > 60)) for step in range(1, 121)])
    write(tmp_path / "validation.jsonl", [{"epoch": 1, "best": True, "step": 60, "loss": 0.3}])
    loss, rate, norm = log.curves(tmp_path).axes
    assert [axis.get_title() for axis in (loss, rate, norm)] == [
        "loss per supervised token",
        "learning rate",
        "gradient norm",
    ]
    assert shown(loss, "each step") == [[step, 1 / step] for step in range(1, 121)]
    assert dict(shown(loss, "smoothed"))[60] == pytest.approx(sum(1 / step for step in range(58, 63)) / 5)
    assert shown(loss, "held-out speakers") == [[60, 0.3]]
    assert shown(rate, "each step")[9] == [10, 1.0] and shown(norm, "smoothed")[9] == [10, 5.0]
    for axis in (loss, rate, norm):
        assert [60.5, 60.5] in [list(drawn.get_xdata()) for drawn in axis.get_lines()]


@pytest.mark.parametrize(
    "lines", [[], [line(1, 1)], [line(1, 1, loss=0.0), {"step": 2, "loss": 2, "learning_rate": 0}]]
)
def test_a_short_log_and_one_without_norms_are_drawn(tmp_path, lines):
    write(tmp_path / "log.jsonl", lines)
    log.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_broken_line_of_the_log_is_named(tmp_path):
    write(tmp_path / "log.jsonl", [line(1, 1), line(2, 1, gradient_norm="x")])
    with pytest.raises(cli.InputError, match="line 2 of .*log.jsonl: gradient_norm 'x'"):
        log.curves(tmp_path)


def test_smoothed_values_are_means_to_either_side():
    assert log.smoothed([3.0, 1.0]) == [3.0, 1.0]  # too few for a window
    values = [float(i % 2) for i in range(100)]
    assert log.smoothed(values)[:3] == [pytest.approx(1 / 3), 0.5, pytest.approx(2 / 5)]
