"""Samples: their members in a tar, and what may not be one."""

import pytest

from groundwork.data.samples import Sample, SampleError, is_member_name, sample_from_fields


def test_further_members_come_back_as_they_are() -> None:
    sample = Sample("a", b"", "", "a clip", {"fps": 25}, {"mp4": b"1", "depth.png": b"2"})
    fields = sample.fields()
    assert sorted(fields) == ["depth.png", "json", "mp4", "txt"]
    assert sample_from_fields("a", fields) == sample


@pytest.mark.parametrize(
    "name", ["pyd", "x.pickle", "weights.pth", "jpg", "JPG2", "a/b", "", "txt"]
)
def test_a_member_is_no_code_and_no_field_of_the_sample(name: str) -> None:
    assert not is_member_name(name)
    with pytest.raises(SampleError, match="member"):
        Sample("a", b"1", "jpg", "text", {}, {name: b"1"})
    assert not sample_from_fields("a", {"png": b"1", name: b""}).members
