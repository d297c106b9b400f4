"""Files that are whole or not there, lines that survive a kill, digests that older files hold."""

import multiprocessing
import os
import threading

import pytest

from hpd import files
from hpd.files import (
    JsonLines,
    checksum_file,
    checksum_json,
    digest_json,
    digest_text,
    digest_tree,
    write_atomically,
    write_json,
)


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
