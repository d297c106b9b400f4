"""Time of HumanEval+'s or MBPP+'s reference solutions in our sandbox and in EvalPlus's own runner.

    pip install evalplus    # in an environment of its own, whose python is PYTHON
    python scripts/evalplus_speed.py HumanEvalPlus.jsonl PYTHON
    python scripts/evalplus_speed.py MbppPlus.jsonl PYTHON --mbpp

Both grade the same programs: first each problem by itself, one runner right after the other, then blocks
of problems with two workers. Expected outputs are computed before (by both) and are not in the times.
Processor time is that of the runner and of everything that it started. The load of the machine is printed,
since both share it.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Run = Callable[[Sequence[str], int], dict[str, Any]]
"""From problems and a number of workers to seconds (clock, processor) and the number that passed."""


def timed(run: Callable[[], int]) -> dict[str, Any]:
    before, start = _processor_seconds(), time.perf_counter()
    passed = run()
    return {
        "clock": time.perf_counter() - start,
        "processor": _processor_seconds() - before,
        "passed": passed,
    }


def _processor_seconds() -> float:
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def ours(data: str, every: int, mbpp: bool) -> tuple[list[str], Run]:
    from hpd.evaluate.benchmarks.code import human_eval_plus, mbpp_plus

    task = mbpp_plus(data) if mbpp else human_eval_plus(data)
    problems = {example.id: task._problems[example.id] for example in task.examples()[::every]}
    print(
        f"expected outputs, hpd: {timed(lambda: task._run_references([*problems.values()]) or 0)}", flush=True
    )

    def run(ids: Sequence[str], workers: int) -> dict[str, Any]:
        task.num_workers = workers
        programs = [task._judged(problems[id_], problems[id_].solution) for id_ in ids]
        return timed(lambda: sum(outcome.status == "passed" for outcome in task._run(programs)))

    return list(problems), run


def serve(mbpp: bool) -> None:
    """EvalPlus's side: a line of JSON in, a line out; its own messages go to the standard error."""
    replies, sys.stdout = sys.stdout, sys.stderr
    from concurrent.futures import ProcessPoolExecutor

    from evalplus import data
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS
    from evalplus.evaluate import check_correctness, get_groundtruth

    if mbpp:
        problems = data.get_mbpp_plus()
        expected = get_groundtruth(problems, data.get_mbpp_plus_hash(), MBPP_OUTPUT_NOT_NONE_TASKS)
    else:
        problems = data.get_human_eval_plus()
        expected = get_groundtruth(problems, data.get_human_eval_plus_hash(), [])

    def arguments(id_: str) -> tuple[Any, ...]:
        problem = problems[id_]
        solution = problem["prompt"] + problem["canonical_solution"]
        return "mbpp" if mbpp else "humaneval", 0, problem, solution, expected[id_], False, True

    def passes(result: dict[str, Any]) -> bool:
        return result["base"][0] == result["plus"][0] == "pass"

    def grade(ids: Sequence[str], workers: int) -> int:
        if workers == 1:
            return sum(passes(check_correctness(*arguments(id_))) for id_ in ids)
        with ProcessPoolExecutor(workers) as pool:
            return sum(
                passes(job.result()) for job in [pool.submit(check_correctness, *arguments(i)) for i in ids]
            )

    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        ids, workers = json.loads(line)
        print(
            json.dumps(timed(lambda ids=ids, workers=workers: grade(ids, workers))), file=replies, flush=True
        )


@contextmanager
def theirs(data: str, python: str, mbpp: bool) -> Iterator[Run]:
    environment = {**os.environ, f"{'MBPP' if mbpp else 'HUMANEVAL'}_OVERRIDE_PATH": os.path.abspath(data)}
    command = [python, __file__, "--serve", *(["--mbpp"] if mbpp else [])]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()

        def run(ids: Sequence[str], workers: int) -> dict[str, Any]:
            process.stdin.write(json.dumps([ids, workers]) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            return json.loads(process.stdout.readline())  # type: ignore[union-attr]

        yield run
        process.stdin.close()


def compare(runs: dict[str, Run], blocks: Sequence[Sequence[str]], workers: int, title: str) -> None:
    """Every block by both runners, the one that goes first changing from block to block."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    load = [os.getloadavg()[0]]
    for number, block in enumerate(blocks):
        for name in [*runs][:: -1 if number % 2 else 1]:
            found[name].append(runs[name](block, workers))
        load.append(os.getloadavg()[0])
    pairs = zip(*([result["clock"] for result in results] for results in found.values()), strict=True)
    ratio = statistics.median(ours / other for ours, other in pairs)
    print(f"{title}; median ratio of the clock {ratio:.2f}; load {min(load):.1f} to {max(load):.1f}")
    for name, results in found.items():
        clock, processor = ([result[key] for result in results] for key in ("clock", "processor"))
        print(
            f"| {name} | {sum(result['passed'] for result in results)} | {statistics.median(clock):.2f} | "
            f"{statistics.median(processor):.2f} | {sum(clock):.0f} | {sum(processor):.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="?", help="the release file, unpacked")
    parser.add_argument("python", nargs="?", help="of the environment that has evalplus")
    parser.add_argument("--every", type=int, default=1, help="take every n-th problem only")
    parser.add_argument("--block", type=int, default=20, help="problems of a block of the second part")
    parser.add_argument("--workers", type=int, default=2, help="of the second part; 1: leave it out")
    parser.add_argument("--mbpp", action="store_true", help="the file is MBPP+'s")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.mbpp)
        return
    if given.python is None:
        parser.error("give the release file and a python that has evalplus")
    ids, run = ours(given.data, given.every, given.mbpp)
    with theirs(given.data, given.python, given.mbpp) as other:
        runs = {"hpd": run, "EvalPlus": other}
        print("| runner | passed | median clock | median processor | clock | processor |")
        compare(runs, [[id_] for id_ in ids], 1, "one problem at a time")
        if given.workers == 1:
            return
        blocks = [ids[start : start + given.block] for start in range(0, len(ids), given.block)]
        compare(runs, blocks, given.workers, f"blocks of {given.block}, {given.workers} workers")


if __name__ == "__main__":
    main()
