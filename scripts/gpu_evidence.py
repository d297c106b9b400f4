"""When does each rule win? One experiment on one GPU, without downloads, in parts that fit into minutes.

    python scripts/gpu_evidence.py --output runs/gpu_evidence --minutes 9    # again until it is done
    python scripts/gpu_evidence.py --output runs/tiny --tiny                 # a dry run on a CPU, a minute
    python scripts/gpu_evidence.py --estimate                                # work and time, nothing is run
    python scripts/gpu_evidence.py --output runs/gpu_evidence --plot .       # pictures; needs matplotlib

A teacher of 98 M weights learns made word problems from scratch, and three smaller students begin to. Then
five methods teach each student from the teacher's stored answers: on 500 rows seen 20 times, and on 10,000
rows seen once. The rows are not the teacher's text; it was trained on their like, as the paper's teacher was.
Rates are chosen per method and regime on validation rows, with the first student and another order of rows.
Nothing is clipped. Predictions are written to results.jsonl before anything is run.

Everything is on the disk: a call that was killed, or whose minutes are over (exit code 75), is continued by
the same command. torch and numpy are enough; neither transformers nor TRL is imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import types
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
try:
    import jaxtyping  # noqa: F401
except ImportError:
    # The source writes shapes in annotations and reads none of them: a name that stands for Tensor will do.
    _shaped = type("Shaped", (), {"__class_getitem__": classmethod(lambda cls, item: item[0])})
    sys.modules["jaxtyping"] = types.ModuleType("jaxtyping")
    sys.modules["jaxtyping"].__dict__.update(dict.fromkeys(("Bool", "Float", "Int"), _shaped))

from evidence.decoder import Decoder  # noqa: E402
from evidence.problems import WordProblems  # noqa: E402
from evidence.report import PREDICTIONS, chosen_rates, table, verdicts  # noqa: E402
from evidence.settings import FULL, METHODS, TINY, TUNING_ORDER, Settings, petaflops  # noqa: E402
from evidence.training import (  # noqa: E402
    Cache,
    Clock,
    OutOfTimeError,
    Rows,
    accuracies,
    cache,
    distill,
    drawn,
    measure,
    precision,
    pretrain,
    tensors,
)

from hpd.files import JsonLines, write_atomically, write_json  # noqa: E402

UNFINISHED = 75
"""Exit code of a call that leaves something to do, as of `hpd train`."""


class Experiment:
    """What is done and what is left, in a folder.

    Args:
        folder: of the state and the results.
        settings: must be those that the folder was begun with.

    Raises:
        ValueError: the folder holds an experiment of other settings.
    """

    def __init__(self, folder: Path, settings: Settings, device: torch.device, clock: Clock):
        self.folder, self.settings, self.device, self.clock = folder, settings, device, clock
        self.language = WordProblems(settings.vocab)
        self.results = JsonLines(folder / "results.jsonl")
        folder.mkdir(parents=True, exist_ok=True)
        head = {
            "role": "predictions",
            "predictions": [prediction.text for prediction in PREDICTIONS],
            "settings": _plain(dataclasses.asdict(settings)),
        }
        lines = self.results.read()
        if not lines:
            self.results.append(head, durable=True)
        elif lines[0] != head:
            raise ValueError(
                f"{folder} holds an experiment of other settings or predictions (--tiny?): give --output "
                "another folder."
            )

    def lines(self) -> list[dict[str, Any]]:
        """Finished runs."""
        return self.results.read()[1:]

    def run(self) -> None:
        """Everything that is missing.

        Raises:
            OutOfTimeError: the clock says so.
        """
        self._note_machine()
        self._note_teacher()
        for seed in range(self.settings.initializations):
            self._student(seed)
        seconds = 0.0
        for role, method, regime, rate, seed in self._missing():
            # This one takes about as long as the last.
            self.clock.need(1.5 * seconds)
            started = time.monotonic()
            order = TUNING_ORDER if role == "tune" else seed
            model, found = distill(
                self._student(seed)["model"],
                method,
                regime,
                rate,
                order,
                self.settings,
                self.language,
                self._rows,
                self._held_out,
            )
            line = {"role": role, "method": method, "regime": regime.name, "rate": rate, **found}
            line |= {"initialization": seed, **found["curve"][-1]}
            if role == "main":
                line |= self._accuracies(model)
            seconds = round(time.monotonic() - started, 2)
            self.results.append(line | {"seconds": seconds}, durable=True)
            kl = f"KL {line['forward_kl']:.4f}"
            print(f"{role} {method} {regime.name} {rate:g}: {kl}, {seconds} s", flush=True)

    def _missing(self) -> Iterator[tuple[str, str, Any, float, int]]:
        """Runs that have no line: those that choose the rates first."""

        def key(line: dict[str, Any]) -> tuple[Any, ...]:
            return tuple(line.get(name) for name in ("role", "method", "regime", "rate", "initialization"))

        done = {key(line) for line in self.lines()}
        pairs = [(method, regime) for regime in self.settings.regimes for method in METHODS]
        for method, regime in pairs:
            for rate in self.settings.rates:
                if ("tune", method, regime.name, rate, 0) not in done:
                    yield "tune", method, regime, rate, 0
        rates = chosen_rates(self.lines(), self.settings)
        for seed in range(self.settings.initializations):
            for method, regime in pairs:
                rate = rates[f"{method} {regime.name}"]["rate"]
                if ("main", method, regime.name, rate, seed) not in done:
                    yield "main", method, regime, rate, seed

    def _note_machine(self) -> None:
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type
        line = {"role": "machine", "device": name, "torch": torch.__version__}
        if line not in self.lines():
            self.results.append(line)

    def _note_teacher(self) -> None:
        """The teacher's own figures: the lines that everything is compared with."""
        if any(line["role"] == "teacher" for line in self.lines()):
            return
        model = self._teacher
        with precision(self.device):
            held_out = measure(model, self._held_out, self.language)
        line = {"role": "teacher", "student_entropy": held_out["teacher_entropy"], **self._accuracies(model)}
        self.results.append(line, durable=True)

    def _accuracies(self, model: Decoder) -> dict[str, float]:
        problems = drawn(self.language, "test", self.settings.problems)
        return accuracies(model, problems, self.settings, self.language, self.device)

    @cached_property
    def _teacher(self) -> Decoder:
        s = self.settings
        state = pretrain(
            self.folder / "teacher.pt",
            s.teacher,
            0,
            s.teacher_steps,
            s,
            self.language,
            self.device,
            self.clock,
        )
        model = Decoder(s.teacher, s.vocab, 0).to(self.device)
        model.load_state_dict(state["model"])
        return model.eval()

    def _cached(self, name: str, count: int) -> Cache:
        path = self.folder / f"cache-{name}.pt"
        if not path.exists():
            rows = tensors(self.language, drawn(self.language, name, count))
            made = cache(self._teacher, Rows(*(field.to(self.device) for field in rows)), self.language)
            # Plain tuples: torch.load reads nothing else without trust.
            write_atomically(path, lambda draft: torch.save((tuple(made.rows), *made[1:]), draft))
        rows, *rest = torch.load(path, map_location=self.device)
        return Cache(Rows(*rows), *rest)

    @cached_property
    def _rows(self) -> Cache:
        return self._cached("rows", max(regime.rows for regime in self.settings.regimes))

    @cached_property
    def _held_out(self) -> Cache:
        return self._cached("validation", self.settings.validation)

    def _student(self, seed: int) -> dict[str, Any]:
        s = self.settings
        state = pretrain(
            self.folder / f"student-{seed}.pt",
            s.student,
            1 + seed,
            s.student_steps,
            s,
            self.language,
            self.device,
            self.clock,
            lambda model: measure(model, self._held_out, self.language)["forward_kl"],
        )
        if not any(line["role"] == "start" and line["initialization"] == seed for line in self.lines()):
            line = {
                "role": "start",
                "initialization": seed,
                "steps": state["step"],
                "forward_kl": state["gap"],
            }
            self.results.append(line, durable=True)
        return state

    def report(self) -> str:
        """The table and the verdicts so far; results.json holds them too."""
        lines = self.lines()
        teacher = next((line for line in lines if line["role"] == "teacher"), {})
        found = verdicts(lines, teacher)
        starts = [line for line in lines if line["role"] == "start"]
        far = [s["initialization"] for s in starts if s["forward_kl"] > self.settings.student_gap]
        text = table(lines, teacher, self.settings)
        text += (
            "\n\nNats per label token on held-out rows, low to high by the teacher's entropy; mean (range) "
            f"over {self.settings.initializations} initializations. *: the best rate is at the edge of those "
            "tried; =: a tie, which goes to the smaller rate.\n"
        )
        if far:
            text += f"Students that began further from the teacher than {self.settings.student_gap}: {far}.\n"
        text += "".join(f"\n- {each['prediction']} {each['verdict']}: {each['margins']}" for each in found)
        rates = chosen_rates(lines, self.settings)
        write_json(self.folder / "results.json", {"verdicts": found, "rates": rates, "runs": lines})
        write_atomically(self.folder / "report.md", text + "\n")
        return text


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def estimate(settings: Settings) -> str:
    """Work of each part, and the minutes at three speeds."""
    language = WordProblems(settings.vocab)
    problems = drawn(language, "estimate", 500)
    labels = sum(len(problem.solution) for problem in problems) / len(problems)
    parts = petaflops(settings, language.prompt_length + language.longest_solution, labels)
    lines = [f"{name}: {work:,.1f} PFLOP" for name, work in parts.items()]
    large = (parts["teacher"] + parts["students"]) * 1e3 / 60
    runs = len(METHODS) * len(settings.regimes) * (len(settings.rates) + settings.initializations)
    steps = runs * settings.regimes[0].rows * settings.regimes[0].epochs // settings.batch
    # Small steps wait for the launch of their kernels, not for arithmetic, so they are counted in steps.
    for speed, milliseconds in ((50, 40), (100, 25), (200, 15)):
        first, second = large / speed, steps * milliseconds / 60e3
        lines.append(
            f"pretraining at {speed} TFLOP/s: {first:.1f} minutes; {steps:,} steps of {milliseconds} ms: "
            f"{second:.1f} minutes; together {first + second:.1f}"
        )
    return "\n".join(lines)


def plot(source: Path, settings: Settings, folder: Path) -> list[Path]:
    """The curves of a finished experiment, as pictures in a folder that is there.

    Raises:
        ValueError: no such folder, no runs, or runs of other settings.
    """
    from evidence.figure import draw

    head, *lines = JsonLines(source / "results.jsonl").read() or [{}]
    if head.get("settings") != _plain(dataclasses.asdict(settings)):
        raise ValueError(f"{source} holds no experiment of these settings (--tiny?).")
    if not any(line["role"] == "main" for line in lines):
        raise ValueError(f"{source} has no finished run yet.")
    if not folder.is_dir():
        raise ValueError(f"--plot {folder}: there is no such folder.")
    return draw(lines, settings, folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_evidence"), help="state and results")
    parser.add_argument("--minutes", type=float, default=9.0, help="end this call after so many")
    parser.add_argument("--tiny", action="store_true", help="a stand-in of everything, for a CPU")
    parser.add_argument("--estimate", action="store_true", help="print the work, and stop")
    parser.add_argument("--plot", type=Path, help="draw the curves of --output into a folder, and stop")
    options = parser.parse_args()
    settings = TINY if options.tiny else FULL
    if options.estimate:
        print(estimate(settings))
        return 0
    if options.plot:
        try:
            print(*plot(options.output, settings, options.plot), sep="\n")
        except ValueError as error:
            parser.error(str(error))
        return 0
    accelerated = torch.cuda.is_available()
    if not (accelerated or options.tiny):
        parser.error("no GPU is available here, and on a CPU this takes days: give --tiny for a dry run.")
    device = torch.device("cuda" if accelerated and not options.tiny else "cpu")
    try:
        experiment = Experiment(options.output, settings, device, Clock(options.minutes))
    except ValueError as error:
        parser.error(str(error))
    try:
        experiment.run()
    except OutOfTimeError:
        print("\n" + experiment.report() + "\n\nNot finished: the same command goes on.")
        return UNFINISHED
    print("\n" + experiment.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
