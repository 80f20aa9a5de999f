"""svd/core/files.py: a kill or a failure at any step leaves the old or the new content; writers don't mix."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from svd.core import files
from svd.core.files import (
    Held,
    atomic_file,
    atomic_folder,
    discard_temporary,
    exclusive,
    recover,
    replace_folder,
    write_json,
    write_text,
)

OLD, NEW = "old" * 1000, "new" * 3000
# What a process does to files is reported to an audit hook before it happens: there it can be killed between any two
# operations. os.fsync reports nothing, so it is wrapped.
KILLED = """
import os, signal, sys
from pathlib import Path
from svd.core import files
target, step, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
count = 0
def at_step(*_):
    global count
    count += 1
    if count == step:
        os.kill(os.getpid(), signal.SIGKILL)
def hook(event, arguments):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
        if str(target.name) in str(arguments[0]):
            at_step()
sync = os.fsync
os.fsync = lambda descriptor: (at_step(), sync(descriptor))
sys.addaudithook(hook)
if kind == "file":
    with files.atomic_file(target) as temporary, temporary.open("w") as stream:
        stream.write("new" * 1000)
        stream.flush()
        at_step()
        stream.write("new" * 2000)
else:
    with files.atomic_folder(target) as temporary:
        (temporary / "a").write_text("new" * 3000)
        at_step()
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b").write_text("new" * 3000)
print(count)
"""


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def in_forks(kind: str, target: Path, prepare: Callable[[], None], check: Callable[[], None]) -> int:
    """Run KILLED in a forked process for every step until one isn't killed; returns the number of steps."""
    for step in range(1, 100):
        prepare()
        child = os.fork()
        if not child:
            sys.argv = ["killed", str(target), str(step), kind]
            with open(os.devnull, "w") as sink:
                os.dup2(sink.fileno(), 1)
                exec(KILLED, {})
                os._exit(0)
        _, status = os.waitpid(child, 0)
        check()
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            return step
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError("it never ends")


def test_a_file_is_old_or_new_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    target = tmp_path / "data.txt"
    seen = set()

    def check() -> None:
        seen.add(target.read_text())
        assert {p.name for p in tmp_path.iterdir()} <= {"data.txt", ".data.txt.tmp"}

    assert in_forks("file", target, lambda: target.write_text(OLD) and None, check) >= 5
    assert seen == {OLD, NEW}
    write_text(target, "last")  # takes over what the killed writers left
    assert target.read_text() == "last" and os.listdir(tmp_path) == ["data.txt"]


def test_a_folder_is_old_or_new_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    target = tmp_path / "data"
    old, new = {"a": OLD, "gone": OLD}, {"a": NEW, "sub/b": NEW}
    seen = []

    def prepare() -> None:
        with atomic_folder(target) as temporary:
            for name, text in old.items():
                (temporary / name).write_text(text)

    def check() -> None:
        recover(target)
        seen.append(content(target))
        assert seen[-1] in (old, new)

    assert in_forks("folder", target, prepare, check) >= 10
    assert old in seen and new in seen
    prepare()
    assert os.listdir(tmp_path) == ["data"], "the next writer removes what the killed ones left"


@pytest.mark.parametrize("step", ["body", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_alone(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "data.txt"
    target.write_text(OLD)

    def broken(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    if step != "body":
        monkeypatch.setattr(os, step, broken)
    with pytest.raises(OSError, match="no space left"), atomic_file(target) as temporary:
        temporary.write_text(NEW)
        if step == "body":
            broken()
    assert target.read_text() == OLD and os.listdir(tmp_path) == ["data.txt"]


def test_a_failure_leaves_the_old_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "data"
    write_text(target / "a", OLD)
    real = os.rename
    for fails_at in range(3):
        renames: list[object] = []

        def broken(source: object, to: object, fails_at: int = fails_at, renames: list[object] = renames) -> None:
            renames.append(source)
            if len(renames) == fails_at:
                raise OSError(errno.ENOSPC, "no space left")
            real(source, to)  # type: ignore[arg-type]

        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
            patch.setattr(os, "rename", broken)
            with atomic_folder(target) as temporary:
                (temporary / "a").write_text(NEW)
                if not fails_at:
                    raise OSError(errno.ENOSPC, "no space left")
        assert content(target) == {"a": OLD} and os.listdir(tmp_path) == ["data"]


def test_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "data.txt"
    texts = [str(n) * 100_000 for n in range(8)]
    barrier = threading.Barrier(len(texts))

    def write(text: str) -> None:
        with atomic_file(target) as temporary, temporary.open("w") as stream:
            barrier.wait(30)  # all of them have a temporary file at the same time
            stream.write(text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_text() in texts and os.listdir(tmp_path) == ["data.txt"]


def test_writers_of_one_folder_take_turns(tmp_path: Path) -> None:
    target = tmp_path / "data"

    def write(text: str) -> None:
        with atomic_folder(target) as temporary:
            for name in "abc":
                (temporary / name).write_text(text)

    threads = [threading.Thread(target=write, args=(str(n),)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(content(target).values())) == 1 and len(content(target)) == 3
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_from_another_file_system_is_copied(
    tmp_path: Path, exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, target = tmp_path / "work" / "finished", tmp_path / "outputs" / "stage"
    write_text(finished / "sub" / "b", NEW)
    target.parent.mkdir()
    if exists:
        write_text(target / "a", OLD)
    real = os.rename

    def rename(source: Path, to: Path) -> None:
        if len({(tmp_path / "work") in Path(path).parents for path in (source, to)}) == 2:
            raise OSError(errno.EXDEV, "invalid cross-device link")
        real(source, to)

    monkeypatch.setattr(os, "rename", rename)
    replace_folder(finished, target)
    assert content(target) == {"sub/b": NEW} and not finished.exists()
    assert {p.name for p in target.parent.iterdir()} == {"stage", ".stage.lock"}


def test_a_kill_while_a_folder_is_copied_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "stage"
    write_text(target / "a", OLD)
    write_text(tmp_path / ".stage.copy" / "half", "")
    recover(target)
    assert content(tmp_path) == {"stage/a": OLD, ".stage.lock": ""}


def test_permissions_and_folders_on_the_way(tmp_path: Path) -> None:
    secret, plain = tmp_path / "new" / "secret", tmp_path / "new" / "plain"
    with atomic_file(secret, mode=0o600) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
        temporary.write_text("x")
    plain_mode = os.umask(0o027)
    try:
        write_json(plain, {"b": 1, "a": [1.5]})
    finally:
        os.umask(plain_mode)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600 and stat.S_IMODE(plain.stat().st_mode) == 0o640
    assert plain.read_text() == '{\n  "a": [\n    1.5\n  ],\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(plain, float("nan"))
    assert sorted(os.listdir(tmp_path / "new")) == ["plain", "secret"]


def test_what_a_killed_writer_left_can_be_discarded(tmp_path: Path) -> None:
    (tmp_path / ".clip.mp4.tmp").write_text("half")
    discard_temporary(tmp_path / "clip.mp4")
    discard_temporary(tmp_path / "clip.mp4")
    assert os.listdir(tmp_path) == []


def test_a_lock_is_refused_or_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "new" / "lock"
    order = []

    def second() -> None:
        with exclusive(lock):
            order.append("second")

    with exclusive(lock, wait=False):
        with pytest.raises(Held) as caught, exclusive(lock, wait=False):
            raise AssertionError
        assert caught.value.holder == str(os.getpid())
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    with exclusive(lock, wait=False):
        pass


def test_a_lock_that_is_removed_while_others_wait_stays_exclusive(tmp_path: Path) -> None:
    lock, inside, most = tmp_path / "lock", [], []

    def enter() -> None:
        for _ in range(50):
            with exclusive(lock):
                inside.append(1)
                most.append(len(inside))
                inside.pop()
                lock.unlink()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(most) == 200


def test_a_lock_ends_with_its_process_though_a_fork_of_it_lives_on(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom svd.core.files import exclusive\n"
        f"with exclusive(Path({str(lock)!r})):\n"
        "    child = os.fork()\n"
        "    if not child: print(os.getpid(), flush=True)\n"  # it lives, and has closed what it got of the lock
        "    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        with pytest.raises(Held), exclusive(lock, wait=False):
            raise AssertionError
        holder.kill()
        holder.wait()
        try:
            with exclusive(lock, wait=False):
                os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def _write_many(target: str, text: str) -> None:
    for _ in range(30):
        write_text(Path(target), text)


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    target = tmp_path / "data.txt"
    write_text(target, OLD)
    writers = [multiprocessing.get_context("fork").Process(target=_write_many, args=(target, t)) for t in (OLD, NEW)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert target.read_text() in (OLD, NEW)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["data.txt"]


def test_no_lock_is_left_open() -> None:
    assert files._held == set()
