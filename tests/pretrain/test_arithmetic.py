"""A resumed run says when the machine it goes on with adds numbers up in another order."""

import pytest
import torch

from groundwork.pretrain.engine.arithmetic import arithmetic, arithmetic_changes, resume_note

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="threads count on a CPU only")


def test_the_same_machine_has_nothing_to_tell() -> None:
    assert resume_note({"versions": arithmetic()}) == ""


@needs_cpu
def test_every_difference_is_named() -> None:
    threads = torch.get_num_threads()
    record = {"versions": {"torch": "2.0.0", "device": "NVIDIA A100", "threads": threads + 1}}
    changes = arithmetic_changes(record)
    assert [text.split(",")[0] for text in changes] == [
        *("PyTorch 2.0.0", "NVIDIA A100", f"OMP_NUM_THREADS={threads + 1}")
    ]
    assert f"OMP_NUM_THREADS={threads + 1}, now {threads}: the last digits" in resume_note(record)


@pytest.mark.parametrize("record", [{}, {"versions": {"torch": torch.__version__}}])
def test_what_an_older_checkpoint_did_not_record_is_passed_over(record: dict[str, object]) -> None:
    assert arithmetic_changes(record) == []
