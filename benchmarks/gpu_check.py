"""What this software does on a GPU, on one page: `make gpu-check`.

    python benchmarks/gpu_check.py [--parts operator,memory] [--minutes 9] [--json FILE]
    python benchmarks/gpu_check.py --tiny    # on a CPU, in seconds: whether it runs
    python benchmarks/gpu_check.py --docs    # docs/performance.md from the stored result, nothing measured

The first parts need torch and this source alone: the operator beside the bare products and other people's,
sizes of its chunks, where its time goes. The others need transformers, TRL and peft: the suite's tests marked
gpu, a whole training step, and its memory beside what `hpd doctor` predicts. What cannot be had is named with
the reason; what fails is named with its error, and the exit code is 1.

A batch of a 1.5B student and a 7B teacher: 8,192 label positions, hidden sizes 1,536 and 3,584, vocabulary
151,936; weights are random, bfloat16. The floor is the four bare products with float32 results, in chunks.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from head import SHAPES, Problem
from peers import naive, peers
from timing import RESULTS, count, interleaved, machine, ratios, replace_block, table

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("sft", "hpd", "forward_kl", "reverse_kl", "generalized_jsd", "hpd_full", "akl")
COMPILED = ("hpd", "forward_kl", "generalized_jsd")
CHUNKS_MIB = (64, 128, 256, 512, 1024, 2048)
GIB = 2**30
STORED = RESULTS / "gpu.json"


class Place(NamedTuple):
    """Where and at what size things are measured."""

    device: str
    dtype: torch.dtype
    shape: str
    repeats: int
    minutes: float


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_gib(run: Callable[[], Any], device: str) -> float:
    """What a call holds at its most, beside what is there before it."""
    if device == "cpu":
        from hpd.estimate.live_bytes import LiveBytes

        with LiveBytes() as live:
            run()
        return live.peak / GIB
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def _measured(candidates: dict[str, Callable[[], None]], place: Place) -> dict[str, Any]:
    """Milliseconds, ratios to the floor and peaks; a candidate that fails is named with its error."""
    failed: dict[str, str] = {}
    for name, run in list(candidates.items()):
        try:
            run()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            del candidates[name]
            _free()
    seconds = interleaved(candidates, place.repeats, place.device)
    return {
        "ms": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
        "ratios": ratios(seconds, "floor"),
        "peak_gib": {name: peak_gib(run, place.device) for name, run in candidates.items()},
        "failed": failed,
    }


def operator(place: Place) -> dict[str, Any]:
    """The operator beside the bare products and other people's operators."""
    problem = Problem(SHAPES[place.shape], device=place.device, dtype=place.dtype)
    candidates: dict[str, Callable[[], None]] = {"floor": problem.floor}
    candidates |= {name: problem.operator(name) for name in METHODS}
    if place.device != "cpu":
        candidates |= {f"{name} (compiled)": problem.operator(name, "compiled") for name in COMPILED}
    others, left_out = peers(problem)
    candidates |= others | {"naive forward KL": naive(problem)}
    return _measured(candidates, place) | {"left_out": left_out}


def _impl(place: Place) -> str:
    """What is looked at more closely: on a CPU nothing is compiled, which takes minutes there."""
    return "chunked" if place.device == "cpu" else "compiled"


def chunks(place: Place) -> dict[str, Any]:
    """Milliseconds and peaks over the bytes of a chunk."""
    found: dict[str, Any] = {}
    for mib in CHUNKS_MIB:
        problem = Problem(
            SHAPES[place.shape], chunk_bytes=mib * 2**20, device=place.device, dtype=place.dtype
        )
        candidates = {
            "floor": problem.floor,
            **{name: problem.operator(name, _impl(place)) for name in COMPILED[:2]},
        }
        found[str(mib)] = _measured(candidates, place)
        del problem, candidates
        _free()
    return found


def profile(place: Place) -> dict[str, Any]:
    """Milliseconds by kernel of one call, the longest first."""
    if place.device == "cpu":
        return {}
    problem = Problem(SHAPES[place.shape], device=place.device, dtype=place.dtype)
    found: dict[str, Any] = {}
    for name in COMPILED[:2]:
        run = problem.operator(name, _impl(place))
        run()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
        events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
        found[name] = {
            event.key[:90]: [round(event.self_device_time_total / 1e3, 3), event.count]
            for event in events[:14]
        }
    return found


def tests(place: Place) -> dict[str, Any]:
    """The suite's tests marked gpu."""
    marked = [file for file in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    command += [*map(str, marked), *(["--collect-only"] if place.device == "cpu" else ["-n", "6"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    found = {"exit_code": done.returncode, "summary": lines[-1] if lines else done.stderr[-300:]}
    if done.returncode:
        found["output"] = done.stdout[-6000:] + done.stderr[-2000:]
    return found


def _steps(place: Place) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Names of what is shown, candidates of benchmarks/step.py, and the settings that differ."""
    for name in ("SFTTrainer", "sft", "hpd", "forward_kl", "hpd (cached)"):
        yield name, name, {}
    yield "hpd (cached), no checkpointing", "hpd (cached)", {"gradient_checkpointing": False}
    if place.device == "cpu":
        return
    yield "hpd, compiled", "hpd", {"impl": "compiled"}
    if find_spec("bitsandbytes"):
        yield "hpd (cached), 8-bit AdamW", "hpd (cached)", {"optim": "adamw_8bit"}


def step(place: Place) -> dict[str, Any]:
    """A whole step, one candidate after the other: each needs the card for itself."""
    from step import TINY, Body, Shape, candidate

    shape = TINY
    settings: dict[str, Any] = {"gradient_checkpointing": True}
    if place.device != "cpu":
        teacher = Body(28, 3584, 18944, 28, 4, tied=False, dtype=torch.bfloat16)
        shape = Shape(151936, 4096, Body(28, 1536, 8960, 12, 2), teacher)
        settings |= {"bf16": True, "use_cpu": False}
    found: dict[str, Any] = {"ms": {}, "peak_gib": {}, "failed": {}}
    for shown, name, changed in _steps(place):
        with tempfile.TemporaryDirectory() as folder:
            try:
                run = candidate(name, folder, shape, place.device, **{**settings, **changed})
                run()
                found["peak_gib"][shown] = peak_gib(run, place.device) + _standing_gib(place.device)
                seconds = interleaved({shown: run}, place.repeats, place.device)[shown]
                found["ms"][shown] = 1e3 * statistics.median(seconds)
            except Exception as error:
                found["failed"][shown] = f"{type(error).__name__}: {error}"[:300]
                traceback.print_exc()
        run = None
        _free()
    found["tokens"] = 2 * shape.tokens
    found["ratios"] = {name: ms / found["ms"]["SFTTrainer"] for name, ms in found["ms"].items()}
    found["predicted_gib"] = predicted(shape, settings)
    return found


def _standing_gib(device: str) -> float:
    return 0.0 if device == "cpu" else torch.cuda.memory_allocated() / GIB


def predicted(shape: Any, settings: dict[str, Any]) -> dict[str, float]:
    """What `hpd doctor` says of the same steps."""
    from step import LABELED, ROWS, SETTINGS, config

    from hpd import DistillConfig
    from hpd.config import load_recipe
    from hpd.data.lengths import Lengths
    from hpd.estimate.memory import StepMemory

    class Planned(NamedTuple):
        recipe: Any
        args: Any
        student_config: Any
        teacher_configs: Any
        lengths: Lengths

    percentiles = dict.fromkeys((50, 90, 99, 100), shape.tokens)
    lengths = Lengths(ROWS, percentiles, LABELED * shape.tokens, 0.0, 0.0, 1.0, LABELED)
    found = {}
    for name in ("hpd", "hpd (cached)", "hpd (cached), no checkpointing"):
        with tempfile.TemporaryDirectory() as folder:
            dtype = str(shape.teacher.dtype).removeprefix("torch.")
            teacher: dict[str, Any] = {"model": "a/teacher", "dtype": dtype}
            if "cached" in name:
                teacher |= {"type": "cached", "path": folder}
                # Of the head only the size is asked for.
                with (Path(folder) / "head.safetensors").open("wb") as file:
                    file.truncate(shape.vocab * shape.teacher.hidden * shape.teacher.dtype.itemsize)
            tree = {
                "student": "a/student",
                "teacher": teacher,
                "method": "hpd",
                "data": {"path": "rows.jsonl"},
            }
            changed = {"gradient_checkpointing": settings["gradient_checkpointing"] and "no" not in name}
            args = DistillConfig(
                **{**SETTINGS, "max_length": shape.tokens, **settings, **changed, "output_dir": folder}
            )
            configs = {"teacher": config(shape, shape.teacher)}
            planned = Planned(load_recipe(tree), args, config(shape, shape.student), configs, lengths)
            found[name] = StepMemory(planned).predict().total / GIB
    return found


PARTS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "operator": operator,
    "chunks": chunks,
    "profile": profile,
    "tests": tests,
    "step": step,
}


def measure(parts: list[str], place: Place, file: Path | None) -> dict[str, Any]:
    """Every part; one that fails says why and stops no other. The file has each as soon as it is there."""
    end = time.monotonic() + 60 * place.minutes
    result: dict[str, Any] = {"machine": machine(place.device), "minutes": {}, "failed": {}}
    for name in parts:
        started = time.monotonic()
        if started > end:
            result["failed"][name] = f"not begun: the {place.minutes:g} minutes were over"
            continue
        try:
            result[name] = PARTS[name](place)
        except ImportError as error:
            result["failed"][name] = f"left out: {error}"
        except Exception as error:
            traceback.print_exc()
            result["failed"][name] = f"{type(error).__name__}: {error}"[:400]
        _free()
        result["minutes"][name] = round((time.monotonic() - started) / 60, 2)
        print(f"{name}: {60 * result['minutes'][name]:.0f} s", flush=True)
        if file:
            file.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _figures(part: dict[str, Any], base: str) -> str:
    rows = [
        [name, f"{part['ratios'][name]:.2f}", f"{ms:.1f}", f"{part['peak_gib'][name]:.2f}"]
        for name, ms in part["ms"].items()
    ]
    rows += [[name, why, "", ""] for name, why in {**part.get("left_out", {}), **part["failed"]}.items()]
    return table(["", f"x {base}", "median ms", "peak GiB"], rows)


def tables(result: dict[str, Any]) -> str:
    """A result as docs/performance.md shows it."""
    place = result["machine"]
    texts = [f"{place.get('device', place['cpu'])}, torch {place['torch']}, {place['date']}."]
    # Parts that a later run left out are kept from the run before, with its date.
    dates = {part: f" ({date})" for part, date in result.get("dates", {}).items()}
    if part := result.get("operator"):
        title = f"The operator, forward and backward{dates.get('operator', '')}:"
        texts += [title, _figures(part, "floor")]
    if part := result.get("chunks"):
        rows = [
            [mib, *(f"{found['ms'][n]:.1f}" for n in found["ms"]), f"{found['peak_gib']['hpd']:.2f}"]
            for mib, found in part.items()
        ]
        names = next(iter(part.values()))["ms"]
        header = ["MiB of a chunk", *(f"{name}, ms" for name in names), "hpd, peak GiB"]
        texts += [f"Chunks{dates.get('chunks', '')}:", table(header, rows)]
    if part := result.get("step"):
        texts += [
            f"A step of {part['tokens']:,} tokens, three quarters of them labeled{dates.get('step', '')}:",
            _figures(part, "SFTTrainer"),
        ]
        said = ", ".join(f"{name} {gib:.1f} GiB" for name, gib in part["predicted_gib"].items())
        texts.append(f"`hpd doctor` predicts: {said}.")
    if part := result.get("tests"):
        texts.append(f"Tests marked gpu{dates.get('tests', '')}: {part['summary']}.")
    if result["failed"]:
        texts.append("Not there: " + "; ".join(f"{name}: {why}" for name, why in result["failed"].items()))
    return "\n\n".join(texts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no part after so many")
    parser.add_argument("--repeats", type=count, default=5)
    parser.add_argument("--json", type=Path, help="store the result in a file")
    parser.add_argument(
        "--docs", action="store_true", help="write the stored result into docs/performance.md"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU: whether it runs")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}: choose among {', '.join(PARTS)}.")
    if options.docs and (options.tiny or options.json):
        parser.error("--docs measures nothing: leave --tiny and --json out.")
    if options.json and not options.json.resolve().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder.")
    if options.docs:
        replace_block("gpu tables", tables(json.loads(STORED.read_text())))
        return 0
    if not (options.tiny or torch.cuda.is_available()):
        parser.error("gpu-check needs a GPU that torch sees; this machine has none. --tiny runs on a CPU.")
    place = Place("cuda", torch.bfloat16, "large", options.repeats, options.minutes)
    if options.tiny:
        place = place._replace(device="cpu", dtype=torch.float32, shape="tiny")
    result = measure(parts, place, options.json)
    print("\n" + tables(result))
    failed = result["failed"] or any(result.get(part, {}).get("failed") for part in ("operator", "step"))
    return 1 if failed or result.get("tests", {}).get("exit_code") else 0


if __name__ == "__main__":
    sys.exit(main())
