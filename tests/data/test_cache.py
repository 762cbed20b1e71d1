import errno
import fcntl
import logging
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from groundwork.data.cache import BlockCache, CacheConfig, block_key

FORK = multiprocessing.get_context("fork")
UNIT = 4096


def key(number: int) -> str:
    return block_key("block", "url", number)


def content(number: int, size: int = 50_000) -> bytes:
    return random.Random(number).randbytes(size)


def disk_use(folder: Path) -> int:
    """What the files of blocks take, counted by other means."""
    files = [path for part in ("blocks", "temporary") for path in (folder / part).rglob("*")]
    return sum(-(-path.stat().st_size // UNIT) * UNIT for path in files if path.is_file())


def disk_use_at_work(folder: Path) -> int:
    """`disk_use` while others write: nobody reserves or evicts under the lock, but files may move
    from the one folder to the other."""
    seen: dict[int, int] = {}
    if not (folder / "usage").exists():
        return 0
    with (folder / "usage").open("rb") as usage:
        fcntl.flock(usage, fcntl.LOCK_EX)
        for path in [*folder.glob("temporary/*"), *folder.glob("blocks/*/*")]:
            with suppress(FileNotFoundError):
                status = path.stat()
                seen[status.st_ino] = -(-status.st_size // UNIT) * UNIT
    return sum(seen.values())


def cache(folder: Path, max_bytes: int = 10**9, touch_after_s: float = 0.0) -> BlockCache:
    return BlockCache(CacheConfig(folder, max_bytes, touch_after_s))


@pytest.mark.parametrize("size", [0, 1, 16_383, 16_384, 16_385, 50_000, 20_000_000])
def test_a_block_comes_back_as_it_was_put_whole_and_in_parts(size: int, tmp_path: Path) -> None:
    blocks, data = cache(tmp_path), content(1, size)
    assert blocks.get(key(1)) is None
    assert blocks.put(key(1), data)
    assert blocks.has(key(1))
    assert blocks.get(key(1)) == data
    generator = random.Random(size)
    for _ in range(20):
        begin, end = sorted(generator.choices(range(size + 1), k=2))
        assert blocks.get(key(1), begin, end) == data[begin:end]
    assert pickle.loads(pickle.dumps(blocks)).get(key(1)) == data
    assert blocks.get(key(2)) is None


def test_every_flipped_byte_is_noticed_and_the_block_dropped(tmp_path: Path) -> None:
    blocks, data = cache(tmp_path), content(1, 40_000)
    blocks.put(key(1), data)
    path = next(path for path in (tmp_path / "blocks").rglob("*") if path.is_file())
    written = path.read_bytes()
    for position in [*range(70), *range(70, len(written), 997), len(written) - 1]:
        path.parent.mkdir(exist_ok=True)
        flipped = bytearray(written)
        flipped[position] ^= 4
        path.write_bytes(flipped)
        assert blocks.get(key(1)) is None, position
        assert not blocks.has(key(1))
    for length in (0, 10, 60, 5_000, len(written) - 1):
        path.write_bytes(written[:length])
        assert blocks.get(key(1)) is None, length


def test_damage_in_one_part_does_not_spoil_reads_of_another_but_is_found(tmp_path: Path) -> None:
    blocks, data = cache(tmp_path), content(1, 100_000)
    blocks.put(key(1), data)
    path = next(path for path in (tmp_path / "blocks").rglob("*") if path.is_file())
    written = bytearray(path.read_bytes())
    written[-1] ^= 1
    path.write_bytes(written)
    assert blocks.get(key(1), 0, 100) == data[:100]
    assert blocks.get(key(1), 99_990, 100_000) is None
    assert not blocks.has(key(1))


def test_a_block_under_the_name_of_another_is_not_taken_for_it(tmp_path: Path) -> None:
    blocks = cache(tmp_path)
    blocks.put(key(1), content(1))
    path = next(path for path in (tmp_path / "blocks").rglob("*") if path.is_file())
    other = tmp_path / "blocks" / key(2)[:2] / key(2)
    other.parent.mkdir(exist_ok=True)
    path.rename(other)
    assert blocks.get(key(2)) is None


def test_the_limit_holds_and_what_was_used_last_stays(tmp_path: Path) -> None:
    limit = 10 * 53_248  # ten blocks of 50,000 bytes with their headers
    blocks = cache(tmp_path, limit)
    for number in range(10):
        assert blocks.put(key(number), content(number))
    for number in range(10):  # times of last use: 3 is used after all others
        path = tmp_path / "blocks" / key(number)[:2] / key(number)
        os.utime(path, (1000 + number, 1000 + number))
    assert blocks.get(key(3)) == content(3)
    for number in range(10, 18):
        assert blocks.put(key(number), content(number))
        assert disk_use(tmp_path) <= limit
    assert blocks.has(key(3))
    assert not any(blocks.has(key(number)) for number in (0, 1, 2, 4, 5, 6, 7))
    assert all(blocks.get(key(number)) == content(number) for number in range(12, 18))
    assert blocks.used() == disk_use(tmp_path)


def test_a_block_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    blocks = cache(tmp_path, 60_000)
    assert blocks.put(key(1), content(1))
    assert not blocks.put(key(2), content(2, 100_000))
    assert blocks.get(key(1)) == content(1)


def test_the_time_of_last_use_is_noted_seldom(tmp_path: Path) -> None:
    blocks = cache(tmp_path, touch_after_s=3600)
    blocks.put(key(1), content(1))
    path = tmp_path / "blocks" / key(1)[:2] / key(1)
    for age, noted in ((1800, False), (7200, True)):
        then = time.time() - age
        os.utime(path, (then, then))
        blocks.get(key(1))
        assert (path.stat().st_mtime > then + 1) is noted


def test_a_full_disk_is_reported_once_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = cache(tmp_path)
    assert blocks.put(key(1), content(1))
    before = disk_use(tmp_path)
    write = os.write

    def full(fd: int, data: bytes) -> int:
        if "temporary" in str(Path(f"/proc/self/fd/{fd}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(os, "write", full)
    with caplog.at_level(logging.WARNING):
        for number in range(2, 6):
            assert not blocks.put(key(number), content(number))
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    assert "reading goes on" in caplog.text
    assert blocks.get(key(1)) == content(1)
    assert disk_use(tmp_path) == before == counted(tmp_path)


def test_a_folder_that_cannot_be_written_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    blocks = cache(tmp_path / "file" / "cache")
    with blocks.fetching(key(1), 1) as locked:
        assert not locked
        assert not blocks.put(key(1), b"x")
    assert blocks.get(key(1)) is None
    assert len(caplog.records) == 1


def test_what_others_keep_in_the_folder_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "blocks" / "ab").mkdir(parents=True)
    theirs = [tmp_path / "note", tmp_path / "blocks" / "note", tmp_path / "blocks" / "ab" / "note"]
    for path in theirs:
        path.write_bytes(bytes(100_000))
    blocks = cache(tmp_path, 120_000)
    for number in range(8):
        assert blocks.put(key(number), content(number))
    assert all(path.stat().st_size == 100_000 for path in theirs)


def counted(folder: Path) -> int:
    """The count that the next writer believes in."""
    return int.from_bytes((folder / "usage").read_bytes()[8:16], "little", signed=True)


def test_a_lost_or_damaged_count_is_made_anew(tmp_path: Path) -> None:
    limit = 10 * 53_248
    for damage in (b"", b"nonsense", None):
        for number in range(6):
            cache(tmp_path, limit).put(key(number), content(number))
        usage = tmp_path / "usage"
        usage.unlink() if damage is None else usage.write_bytes(damage)
        blocks = cache(tmp_path, limit)
        for number in range(6, 14):
            assert blocks.put(key(number), content(number))
            assert disk_use(tmp_path) <= limit
            assert counted(tmp_path) >= disk_use(tmp_path)


def test_one_of_many_fetches_a_block_and_the_others_find_it(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def work(worker: int) -> None:
        blocks = cache(tmp_path / "cache")
        for number in range(6):
            with blocks.fetching(key(number), 30) as locked:
                assert locked
                if blocks.get(key(number)) is None:
                    with log.open("ab", buffering=0) as file:
                        file.write(b"%d\n" % number)
                    time.sleep(0.01)
                    blocks.put(key(number), content(number))
        os._exit(0)

    workers = [FORK.Process(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert sorted(map(int, log.read_text().split())) == list(range(6))


def test_a_killed_holder_lets_go_and_a_hanging_one_is_not_waited_for(tmp_path: Path) -> None:
    ready, blocks = FORK.Event(), cache(tmp_path)

    def hold() -> None:
        with blocks.fetching(key(1), 10):
            ready.set()
            time.sleep(300)

    holder = FORK.Process(target=hold)
    holder.start()
    assert ready.wait(30)
    start = time.monotonic()
    with blocks.fetching(key(1), 0.2) as locked:
        assert not locked
    assert time.monotonic() - start < 5
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(30)
    with blocks.fetching(key(1), 10) as locked:
        assert locked


def test_a_process_stopped_while_it_counts_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("groundwork.data.cache.USAGE_TIMEOUT_S", 0.1)
    assert cache(tmp_path).put(key(1), content(1))
    with (tmp_path / "usage").open("rb") as usage:
        fcntl.flock(usage, fcntl.LOCK_EX)
        blocks, start = cache(tmp_path), time.monotonic()
        assert not any(blocks.put(key(number), content(number)) for number in range(2, 50))
        assert time.monotonic() - start < 3  # waited for once, not for each block
    assert len(caplog.records) == 1
    assert "another process holds its lock" in caplog.text


def test_a_lock_is_free_again_though_a_child_was_forked_meanwhile(tmp_path: Path) -> None:
    blocks, leave = cache(tmp_path), FORK.Event()
    with blocks.fetching(key(1), 10):
        child = FORK.Process(target=leave.wait, args=(60,))
        child.start()
    try:
        with blocks.fetching(key(1), 0.2) as locked:
            assert locked
    finally:
        leave.set()
        child.join(30)


def churn(folder: Path, limit: int, seed: int, rounds: int) -> None:
    """Put, read and drop blocks at random; everything that comes back must be right."""
    blocks, generator = cache(folder, limit), random.Random(seed)
    for _ in range(rounds):
        number = generator.randrange(40)
        with blocks.fetching(key(number), 20):
            found = blocks.get(key(number))
            if found is None:
                blocks.put(key(number), content(number))
            else:
                assert found == content(number)
        if generator.random() < 0.1:
            blocks.drop(key(generator.randrange(40)))


def test_killed_processes_leave_a_cache_that_goes_on_within_its_limit(tmp_path: Path) -> None:
    """kill -9 in the middle of fetching and evicting, 12 times, two processes at work."""
    limit, generator = 12 * 53_248, random.Random(0)
    for trial in range(12):
        pair = [
            FORK.Process(target=churn, args=(tmp_path, limit, trial * 2 + n, 10**9)) for n in (0, 1)
        ]
        for process in pair:
            process.start()
        time.sleep(0.05 + 0.15 * generator.random())
        assert disk_use_at_work(tmp_path) <= limit
        for process in pair:
            assert process.is_alive(), process.exitcode
            os.kill(process.pid, signal.SIGKILL)
            process.join(30)
        assert disk_use(tmp_path) <= limit
        if (tmp_path / "usage").exists():
            assert counted(tmp_path) >= disk_use(tmp_path)  # a crash errs on the safe side
    churn(tmp_path, limit, 99, 300)
    blocks = cache(tmp_path, limit)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert blocks.used() == disk_use(tmp_path) <= limit
    assert sum(blocks.get(key(number)) == content(number) for number in range(40)) >= 9


def test_a_writer_killed_in_the_middle_of_a_block_leaves_nothing(tmp_path: Path) -> None:
    written = FORK.Event()

    def die() -> None:
        write = os.write

        def half(fd: int, data: bytes) -> int:
            if len(data) > 10_000:
                write(fd, bytes(data)[: len(data) // 2])
                written.set()
                time.sleep(300)
            return write(fd, data)

        os.write = half
        cache(tmp_path).put(key(1), content(1))

    writer = FORK.Process(target=die)
    writer.start()
    assert written.wait(30)
    other = cache(tmp_path)
    assert other.put(key(2), content(2))
    assert len(list((tmp_path / "temporary").iterdir())) == 1  # it is alive, so it is let be
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(30)
    assert cache(tmp_path).put(key(3), content(3))
    assert list((tmp_path / "temporary").iterdir()) == []
    assert cache(tmp_path).get(key(1)) is None


def test_threads_and_jobs_share_a_folder(tmp_path: Path) -> None:
    limit = 12 * 53_248
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            churn(tmp_path, limit, seed, 60)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert disk_use_at_work(tmp_path) <= limit
        time.sleep(0.01)
    assert failures == []
