"""Curves over training: from which rows they are, and which lines share an axis."""

from helpers.grid_results import make_run
from matplotlib.figure import Figure

from hpd.experiments.curves import curve_panels, validation_is_missing
from hpd.experiments.plots import results_looks
from hpd.experiments.results import Results

METHODS = ("hpd", "sft", "forward_kl")


def training(method, seed, validated=True, **more):
    logs = []
    for step in (10, 20, 30):
        batch = {"loss": 5.0 + step, "grad_norm": 1.0, "k1_positive": 0.9, "student_entropy": 9.0}
        logs.append({"step": step, **batch, "forward_kl": 9.0, "teacher_entropy": 8.0})
        rows = {"eval_forward_kl": 5 / step + seed, "eval_student_entropy": 0.1, "eval_teacher_entropy": 0.06}
        if validated:
            logs.append({"step": step, "eval_loss": 1.0, **rows})
        logs.append({"step": step, "own_entropy": 0.2})
    return make_run({"method": method, **more}, seed, logs=logs, recipe={"method": method})


def panels_of(runs):
    results = Results(title="t", runs=runs, axes=tuple(runs[0].axes))
    return results, {p.key: p for p in curve_panels(results, results_looks(results, "forward_kl"))}


def plain(row):
    return tuple(getattr(cell, "sort", cell) for cell in row)


def test_kl_and_entropy_are_of_validation_rows_with_the_teachers_line():
    _, panels = panels_of([training(m, seed) for m in METHODS for seed in (0, 1)])
    kl, entropy, own = (panels[f"curve-{name}"] for name in ("forward_kl", "student_entropy", "own_entropy"))
    assert plain(kl.rows[0]) == ("hpd", 10, 1.0, 0.5, 1.5)
    assert kl.title == "KL(teacher || student), nats, over training (validation rows)"
    assert kl.note == "Mean of 2 seeds; band: lowest to highest seed."
    assert plain(entropy.rows[0])[2] == 0.1
    assert entropy.note.endswith("Dotted: the teacher's, 0.0600.")
    assert "The teacher's entropy is that on the validation rows. Dotted: the teacher's, 0.0600." in own.note


def test_kl_of_batches_is_not_drawn_and_the_report_says_what_to_set():
    results, panels = panels_of([training(m, 0, validated=False) for m in METHODS])
    assert "curve-forward_kl" not in panels
    assert validation_is_missing(results)
    entropy = panels["curve-student_entropy"]
    assert "(training batches)" in entropy.title
    assert entropy.note.endswith("Dotted: the teacher's, 8.00.")
    assert not validation_is_missing(panels_of([training("hpd", 0)])[0])


def test_an_evaluation_at_the_end_alone_is_no_curve():
    run = training("hpd", 0)
    last = [log for log in run.logs if log["step"] == 30 or "eval_loss" not in log]
    results, panels = panels_of([make_run({"method": "hpd"}, 0, logs=last, recipe={"method": "hpd"})])
    assert "curve-forward_kl" not in panels
    assert "curve-own_entropy" in panels
    assert validation_is_missing(results)


def test_losses_of_two_objectives_never_share_an_axis():
    runs = [training(m, 0, model=size) for m in METHODS for size in ("small", "large")]
    _, panels = panels_of(runs)
    figure = Figure(layout="constrained")
    panels["curve-loss"].draw(figure)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title(loc="left") for axis in shown] == list(METHODS)
    assert all(len(axis.get_lines()) == 2 for axis in shown)  # both sizes of one objective
    assert "cannot be compared" in panels["curve-loss"].note


def test_lines_of_one_plot_differ_in_the_method_alone():
    runs = [training(m, 0, limit=n) for m in METHODS for n in ("100", "1000")]
    _, panels = panels_of(runs)
    assert {row[0] for row in panels["curve-forward_kl"].rows} == {"limit=100", "limit=1000"}
    assert {row[1] for row in panels["curve-forward_kl"].rows} == set(METHODS)


def test_branches_are_one_figure():
    _, panels = panels_of([training(m, 0) for m in METHODS])
    assert [key for key in panels if key.startswith("branches")] == ["branches"]
    assert {row[0] for row in panels["branches"].rows} == set(METHODS)
