"""Where results are written: nothing of the user's is lost, and what cannot be written is named."""

import gc
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from groundwork.data.atomic import directory_written_atomically, write_atomically
from groundwork.data.shards import read_manifest
from groundwork.launch.cli import main
from groundwork.launch.errors import reporting, require_file, require_folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for name in ("red", "blue"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), name).save(folder / name / "0.png")
    return folder


def build(pictures: Path, out: Path, *more: str) -> int:
    return main(["shards", "build", "image-folder", str(pictures), "--out", str(out), *more])


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("out", [".", "red", "new", "..", "../link"])
def test_a_data_set_is_not_written_over_its_source(
    out: str, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures.parent / "link").symlink_to(pictures)
    before = files(pictures)
    assert build(pictures, pictures / out, "--overwrite") == 1
    assert "lie in one another" in capsys.readouterr().err
    assert files(pictures) == before


def test_overwrite_replaces_data_sets_only(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "manifest.json").write_text('{"name": "a browser extension"}')
    assert build(pictures, mine, "--overwrite") == 1
    assert "is no data set" in capsys.readouterr().err
    assert [file.name for file in files(mine)] == ["manifest.json"]
    out = tmp_path / "out"
    assert build(pictures, out) == 0
    next(out.glob("*.tar")).unlink()  # a damaged data set is one, too
    assert build(pictures, out, "--overwrite", "--seed", "1") == 0
    assert read_manifest(out).source["seed"] == 1


def test_a_folder_of_others_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with (
        pytest.raises(FileExistsError),
        directory_written_atomically(tmp_path / "out", is_ours=lambda folder: False),
    ):
        pass
    assert [file.name for file in files(tmp_path)] == ["out", "mine.txt"]


def test_a_folder_that_fills_while_another_is_written_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (
        pytest.raises(FileExistsError),
        directory_written_atomically(out, is_ours=lambda folder: False),
    ):
        (out / "mine.txt").write_text("mine")
    assert (out / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ["shards", "build", "image-folder", "PICTURES", "--out", "FILE/x"],
        ["shards", "build", "image-folder", "PICTURES", "--out", "/proc/x"],
        ["knowledge", "build", "wordnet", "--out", "FILE/x.gkb"],
        ["knowledge", "build", "wordnet", "--out", "PICTURES"],
        ["evaluate", "zeroshot", "--checkpoint", "NONE", "--out", "FILE"],
        ["export", "--checkpoint", "NONE", "--out", "FILE"],
        ["report", "--run", "NONE", "--zeroshot", "NONE", "--out", "PICTURES"],
        ["demo", "--out", "FILE"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_written_is_named_before_any_work(
    arguments: list[str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    places = {"PICTURES": str(pictures), "FILE": str(tmp_path / "file"), "NONE": "none"}
    for name, place in places.items():
        arguments = [word.replace(name, place) for word in arguments]
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert arguments[-1] in message or str(tmp_path / "file") in message
    assert "Traceback" not in message
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_with_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> int:
        out = tmp_path / "out"
        with (
            directory_written_atomically(out, is_ours=lambda folder: False),
            Path("/dev/full").open("wb", buffering=0) as file,
        ):
            file.write(b"x")
        return 0

    assert reporting(run) == 1
    message = capsys.readouterr().err
    assert f"{tmp_path / 'out'}: No space left on device; free some space" in message
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_nobody_can_mend_keeps_its_traceback() -> None:
    def run() -> int:
        raise ConnectionRefusedError(111, "Connection refused")

    with pytest.raises(ConnectionRefusedError):
        reporting(run)


def test_what_can_be_written_is_not_made_by_asking(tmp_path: Path) -> None:
    require_folder(tmp_path / "a" / "b")
    require_file(tmp_path / "a" / "b.json")
    assert list(tmp_path.iterdir()) == []


def test_files_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from groundwork.data.atomic import directory_written_atomically\n"
        "from groundwork.launch.errors import reporting\n"
        "def run():\n"
        "    with directory_written_atomically(Path(sys.argv[1]), is_ours=lambda folder: False):\n"
        "        time.sleep(60)\n"
        "sys.exit(reporting(run))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(out)], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.iterdir()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, message = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert message.strip() == "terminated"
    assert list(tmp_path.iterdir()) == []


def fail(rank: int, local_rank: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds that a rank waits before it tells its error."""
    waited: list[float] = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(time, "sleep", waited.append)

    def run() -> int:
        raise FileNotFoundError(2, "No such file or directory", "a.tar")

    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert reporting(run, rank=rank) == 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    return sum(waited)


def test_the_first_rank_of_a_node_speaks_and_the_others_give_it_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(0, "0", monkeypatch) == 0
    assert "error: a.tar" in capsys.readouterr().err
    assert fail(8, "0", monkeypatch) == 0
    assert "error (rank 8): a.tar" in capsys.readouterr().err
    assert fail(1, "1", monkeypatch) > 0
    assert "error (rank 1): a.tar" in capsys.readouterr().err


def test_a_full_disk_ends_a_data_set_with_one_message(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # EFBIG in place of ENOSPC
    try:
        assert build(pictures, tmp_path / "out") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    gc.collect()
    message = capfd.readouterr().err
    assert f"{tmp_path / 'out'}: File too large" in message
    assert "Traceback" not in message
    assert sorted(tmp_path.iterdir()) == [pictures]
