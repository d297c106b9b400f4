"""Run by tests/training/test_stopping.py, and by hand for docs/evidence/reliability.md: two ranks that train
and end, again and again.

Usage: python tests/helpers/ending_ranks.py PAIR OUTPUT MODE RUNS

MODE is `command` (what `hpd train` does), `script` (a trainer in a global variable of a program that ends),
`failing` (the same, by an error) or `torch` (a collective operation and the end, without hpd). Ranks are
forked, so that imports are paid for once; each ends its interpreter as any program does, while two busy loops
keep the processors. The last line is a JSON object: how often each exit status came, and what standard error
said.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from datasets import Dataset
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpd import DistillConfig, DistillTrainer
from hpd.methods.prefixes import Prefixes, RolloutConfig
from hpd.terminal.training import run_train

ROWS = [{"prompt": f"say {i}:", "completion": " one two"} for i in range(8)]
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "dataloader_num_workers": 1,
    "gradient_checkpointing": False,
    "max_length": 64,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
}


def command(pair: Path, output: Path) -> None:
    """A recipe with loader workers, rollouts, an evaluation and a tracker."""
    tree = {
        "student": str(pair / "student"),
        "teacher": str(pair / "teacher"),
        "method": "forward_kl",
        "prefixes": {"student": 0.5},
        "rollouts": {"max_new_tokens": 4},
        "data": {"path": str(output / "rows.jsonl"), "validation": 0.25},
        "train": {**SETTINGS, "logging_steps": 1, "report_to": "tensorboard"},
        "output_dir": str(output / "run"),
    }
    path = output / f"recipe-{os.environ['RANK']}.json"
    path.write_text(json.dumps(tree))
    run_train(path, (), dry_run=False, overwrite=True)


def script(pair: Path, output: Path) -> None:
    """The trainer stays in a global variable, as in a notebook or a script without functions."""
    global trainer
    load = AutoModelForCausalLM.from_pretrained
    trainer = DistillTrainer(
        model=load(pair / "student"),
        teacher=load(pair / "teacher"),
        method="forward_kl",
        prefixes=Prefixes(student=0.5),
        rollouts=RolloutConfig(max_new_tokens=4),
        args=DistillConfig(output_dir=str(output / "run"), report_to="none", disable_tqdm=True, **SETTINGS),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(pair / "student"),
    )
    trainer.train()
    _reduce()


def failing(pair: Path, output: Path) -> None:
    script(pair, output)
    raise RuntimeError("both ranks fail here")


def without_hpd(pair: Path, output: Path) -> None:
    distributed.init_process_group("gloo")
    _reduce()


def _reduce() -> None:
    """The last operation: its tensor soon belongs to nobody but the thread that reduced it."""
    for _ in range(40):
        distributed.all_reduce(torch.ones(4))


MODES = {"command": command, "script": script, "failing": failing, "torch": without_hpd}


def start(mode: str, pair: Path, output: Path, port: int, errors: int) -> list[int]:
    """Fork two ranks; returns their ids."""
    ranks = []
    for rank in range(2):
        child = os.fork()
        if child:
            ranks.append(child)
            continue
        os.dup2(errors, 2)
        os.dup2(errors, 1)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # A thread that needs the interpreter waits until the main thread gives it away, as on a busy machine.
        sys.setswitchinterval(100)
        atexit.register(_tell_of_threads)
        MODES[mode](pair, output)
        sys.exit(0)
    return ranks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tell_of_threads() -> None:
    """What the program's end left to the interpreter's: registered first, so that it is called last."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    if any("gloo" in name for name in names):
        print("threads of gloo are left", file=sys.stderr, flush=True)


def busy() -> int:
    child = os.fork()
    while not child:
        pass
    return child


def main(pair: Path, output: Path, mode: str, runs: int) -> None:
    torch.set_num_threads(1)
    (output / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    gc.freeze()
    loops = [busy(), busy()]
    statuses: Counter[int] = Counter()
    said: list[str] = []
    for _ in range(runs):
        with tempfile.TemporaryFile() as errors:
            ranks = start(mode, pair, output, free_port(), errors.fileno())
            ended = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
            errors.seek(0)
            lines = errors.read().decode(errors="replace").splitlines()
        statuses.update(ended)
        signs = ("terminate called", "threads of gloo" if mode != "torch" else "terminate called")
        said += [line for line in lines if line.startswith(signs)]
        if ended != [int(mode == "failing")] * 2:
            said += lines[-10:]
    for loop in loops:
        os.kill(loop, signal.SIGKILL)
        os.waitpid(loop, 0)
    print(json.dumps({"statuses": dict(statuses), "said": said}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
