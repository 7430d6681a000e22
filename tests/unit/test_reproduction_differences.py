"""What counts as the same when a run is trained again: every figure, no time, no megabyte."""

import math
import subprocess
import sys

from ml.workflows.reproduce import differences, differences_of_surroundings


def curve(*values):
    return tuple(enumerate(values))


def test_the_same_figures_are_the_same():
    was = {"test_accuracy": curve(0.5), "fit/loss": curve(2.0, 1.0, math.nan)}
    assert differences(was, {"fit/loss": curve(2.0, 1.0, math.nan), "test_accuracy": curve(0.5)}) == []


def test_the_last_digit_counts_and_an_epoch_is_named():
    was = {"test_accuracy": curve(0.5), "fit/loss": curve(2.0, 1.0)}
    now = {"test_accuracy": curve(math.nextafter(0.5, 1)), "fit/loss": curve(2.0, 1.5)}
    assert differences(was, now) == [
        {"metric": "fit/loss, epoch 1", "was": 1.0, "is": 1.5},
        {"metric": "test_accuracy", "was": 0.5, "is": math.nextafter(0.5, 1)},
    ]


def test_a_figure_that_only_one_of_them_has_is_a_difference():
    assert differences({"fit/loss": curve(2.0, 1.0)}, {"fit/loss": curve(2.0), "new": curve(1.0)}) == [
        {"metric": "fit/loss, epoch 1", "was": 1.0, "is": None},
        {"metric": "new", "was": None, "is": 1.0},
    ]


def test_times_and_memory_are_the_machines_business():
    names = ("fit_seconds", "wall_seconds", "peak_memory_mib", "fit/images_per_second", "system/cpu_utilization")
    assert differences({name: curve(1.0, 2.0) for name in names}, {name: curve(3.0) for name in names}) == []


def test_of_the_surroundings_what_can_change_a_result_is_compared():
    was = {"version.keras": "3.1", "hardware.cpu": "A", "git.sha": "1", "weights.sha256": "none", "command": "a"}
    now = {"version.keras": "3.2", "hardware.cpu": "A", "git.sha": "1", "keras.backend": "jax", "command": "b"}
    assert differences_of_surroundings(was, now) == [
        {"what": "keras.backend", "was": "not recorded", "is": "jax"},
        {"what": "version.keras", "was": "3.1", "is": "3.2"},
        {"what": "weights.sha256", "was": "none", "is": "not recorded"},
    ]


def test_it_imports_no_tensorflow():
    code = "import sys, ml.workflows.reproduce, ml.workflows.results; print({'tensorflow', 'keras'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
