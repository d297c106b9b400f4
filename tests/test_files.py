"""Files that are whole or not there, lines that survive a kill, digests that older files hold."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest

from hpd import files, locks
from hpd.files import (
    JsonLines,
    checksum_file,
    checksum_json,
    digest_json,
    digest_text,
    digest_tree,
    import_named,
    look_beside,
    write_atomically,
    write_json,
)
from hpd.locks import LOCK, InUse, empty_folder, entries, holding


@pytest.mark.parametrize("content", ["é\n", "é\n".encode(), lambda draft: draft.write_bytes("é\n".encode())])
def test_a_file_is_written_whole(tmp_path, content):
    path = tmp_path / "file.txt"
    path.write_text("before")
    write_atomically(path, content)
    assert path.read_bytes() == "é\n".encode()
    assert os.listdir(tmp_path) == ["file.txt"]


def test_an_error_leaves_the_file_as_it_was_and_no_draft(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def fail(draft):
        draft.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_says_who_may_read(tmp_path, mask, mode):
    def private(draft):
        draft.unlink()
        os.close(os.open(draft, os.O_CREAT, 0o600))

    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "a", "text")
        write_atomically(tmp_path / "b", private)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [mode, mode]


def test_content_reaches_the_disk_before_the_name_and_the_folder_after(tmp_path, monkeypatch):
    order = []
    flush, replace = files.flush, os.replace
    monkeypatch.setattr(files, "flush", lambda path: (order.append(path.name), flush(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    write_json(tmp_path / "a.json", {"b": None})
    assert order == [f".a.json.{os.getpid()}.part", "rename", tmp_path.name]


def test_lines_of_every_kind_come_back(tmp_path):
    lines = JsonLines(tmp_path / "lines.jsonl")
    assert lines.read() == []
    values = [{"text": "a\u2028b\nc"}, [1, None], "é", {}]
    for value in values[:2]:
        lines.append(value)
    lines.append(values[2], durable=True)
    lines.append(values[3])
    assert lines.read() == values
    lines.write(values[1:])
    assert lines.read() == values[1:]


def test_a_line_is_whole_or_left_out_wherever_a_kill_cut_it(tmp_path):
    lines = JsonLines(tmp_path / "lines.jsonl")
    values = [{"number": 1}, {"text": "é" * 5}]
    for value in values:
        lines.append(value)
    whole = lines.path.read_bytes()
    for cut in range(len(whole) + 1):
        lines.path.write_bytes(whole[:cut])
        kept = lines.read()
        assert kept == values[: len(kept)]
        assert len(kept) >= whole[:cut].count(b"\n")
        lines.append("next")
        assert lines.read() == [*kept, "next"]


def _append_many(path, number):
    for index in range(50):
        JsonLines(path).append({"writer": number, "index": index, "text": "x" * 500})


def test_processes_and_threads_append_to_one_file(tmp_path):
    path = tmp_path / "lines.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(path, number)) for number in range(2)]
    workers += [threading.Thread(target=_append_many, args=(path, number)) for number in (2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = sorted((value["writer"], value["index"]) for value in JsonLines(path).read())
    assert found == [(number, index) for number in range(4) for index in range(50)]


def test_digests_are_those_of_earlier_versions(tmp_path):
    """Ids in evals.json, manifests, parts of `hpd generate`, and checksums in caches."""
    identity = {"model": "m", "task": "é", "settings": {"b": 1, "a": None}}
    assert digest_json(identity)[:12] == "04c2444220eb"
    part = digest_json({"settings": {"seed": 1}, "prompts": ["é"]}, ensure_ascii=False)
    assert part == "02f17c31b78cb7cb2c71d1130a5a790bc481234a90053155fa1f576a7de7d3bb"
    assert digest_text("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert checksum_json({"b": [1, None], "a": "é"}) == "551549126ad0b185a970c7822df66393"
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    assert digest_tree(folder)[:16] == "f2a0f7944636d339"
    assert digest_tree(folder / "config.json")[:16] == "b436aea9b1cce35d"
    assert checksum_file(folder / "config.json", 5) == checksum_file(_bytes(tmp_path, b'{"mod'))


def _bytes(folder, content):
    path = folder / "bytes"
    path.write_bytes(content)
    return path


def hold(target, is_folder, ready, end):
    with holding(target, is_folder=is_folder):
        ready.set()
        end.wait(60)


@pytest.fixture
def holder():
    """Starts another process that holds a place."""
    context = multiprocessing.get_context("fork")
    started = []

    def start(target, is_folder=True):
        ready, end = context.Event(), context.Event()
        process = context.Process(target=hold, args=(target, is_folder, ready, end))
        process.start()
        started.append(process)
        assert ready.wait(60)
        return process, end

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_place_has_one_holder_and_its_name(tmp_path, holder, is_folder):
    target = tmp_path / "a" / "place"
    process, end = holder(target, is_folder)
    message = f"place is in use: process {process.pid} on .* since 20.* \\(kill {process.pid}\\)"
    with pytest.raises(InUse, match=message), holding(target, is_folder=is_folder):
        pass
    end.set()
    process.join()
    # Nothing was there before, and nothing is left.
    assert not target.parent.exists()
    with holding(target, is_folder=is_folder), holding(target, is_folder=is_folder):
        assert target.exists() == is_folder
    assert not target.parent.exists()


def test_a_killed_holder_holds_nothing(tmp_path, holder):
    process, _ = holder(tmp_path)
    process.kill()
    process.join()
    assert (tmp_path / LOCK).is_file()
    with holding(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_a_child_does_not_keep_the_lock_of_its_parent(tmp_path):
    """A loader's worker outlives a killed process for seconds."""
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom hpd.locks import holding\n"
        "with holding(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n        print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True)
    child = int(done.stdout.readline())
    try:
        with pytest.raises(InUse), holding(tmp_path):
            pass
        done.kill()
        done.wait(60)
        os.kill(child, 0)
        with holding(tmp_path):
            pass
    finally:
        os.kill(child, 9)


def test_threads_are_told_apart(tmp_path):
    found = []

    def other():
        try:
            with holding(tmp_path):
                found.append("held")
        except InUse as error:
            found.append(str(error))

    with holding(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"process {os.getpid()} " in found[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "in use: process PID on .* since then"),
        ({"started": "1"}, None),  # another process got its number
        ({"pid": 2**22 + 1}, None),
        ({"host": "elsewhere"}, "in use: process PID on elsewhere .* since then"),  # a container
        ({"boot": "before"}, None),  # the machine was started again
        ({"boot": "its own", "host": "elsewhere"}, "cannot tell whether .* delete .*lock"),
        ({"boot": "its own", "host": "elsewhere", "job": "7", "restarts": "0"}, None),
        ({"boot": "its own", "host": "elsewhere", "job": "7", "restarts": "1"}, "cannot tell"),
        ({"boot": "its own", "host": "elsewhere", "job": "8", "restarts": "0"}, "cannot tell"),
    ],
)
def test_who_is_named_in_a_lock_that_the_system_does_not_have(tmp_path, monkeypatch, changes, message):
    """A file system without locks, or with locks that other machines do not see: the file decides."""
    process = subprocess.Popen(["sleep", "60"])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    try:
        note = {**locks._note(), "pid": process.pid, "started": locks._start_of(process.pid), "job": None}
        text = json.dumps({**note, "since": "then", **changes})
        (tmp_path / LOCK).write_text(text)
        if message is None:
            with holding(tmp_path):
                pass
            return
        with pytest.raises(InUse, match=message.replace("PID", str(process.pid))), holding(tmp_path):
            pass
        assert (tmp_path / LOCK).read_text() == text
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\0" * 100])
def test_a_damaged_lock_that_nobody_has_is_in_nobodys_way(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    with holding(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_the_processes_of_one_launch_are_one_holder(tmp_path, monkeypatch):
    with holding(tmp_path):
        monkeypatch.setenv("RANK", "1")
        found = []

        def other():
            with holding(tmp_path):
                found.append(True)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert found


def test_a_folder_is_emptied_around_its_lock(tmp_path):
    (tmp_path / "sub" / "sub").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    with holding(tmp_path):
        assert {path.name for path in entries(tmp_path)} == {"sub", "file", "link"}
        empty_folder(tmp_path)
        assert entries(tmp_path) == []
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match="file cannot be written: .* choose another place"),
        holding(tmp_path / "file"),
    ):
        pass


def test_a_named_object_is_found_in_the_working_folder_and_beside_a_recipe(tmp_path, monkeypatch):
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder, module in ((here, "hpd_mine_here"), (beside, "hpd_mine_beside")):
        folder.mkdir()
        (folder / f"{module}.py").write_text("VALUE = 3\n")
    monkeypatch.chdir(here)
    before = list(sys.path)
    assert import_named("hpd_mine_here:VALUE") == 3
    with pytest.raises(ValueError, match="No module named 'hpd_mine_beside'.*next to the recipe"):
        import_named("hpd_mine_beside:VALUE")
    look_beside(beside / "recipe.yaml")
    assert import_named("hpd_mine_beside:VALUE") == 3
    assert sys.path == before


def test_a_folder_does_not_hide_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "yaml.py").write_text("safe_load = None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "yaml", raising=False)
    assert import_named("yaml:safe_load") is not None


@pytest.mark.parametrize("name", ["nowhere:x", "json:nothing", "json", ":x", "hpd_broken:x"])
def test_what_cannot_be_imported_is_one_sentence(tmp_path, monkeypatch, name):
    (tmp_path / "hpd_broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot be imported"):
        import_named(name)
