import pytest

from dlrm_deploy.engines.tensorrt.header import PlanHeader, read_header


def header(mask: int, magic: bytes = b"vtrt") -> bytes:
    return magic + bytes(20) + bytes([1, 7, 1, 116]) + b"vtrt" + bytes([mask]) + bytes(31)


@pytest.mark.parametrize(
    ("mask", "capabilities"),
    [(0x7E, ("8.0", "8.6", "8.9", "12.0", "12.1", "later")), (0x01, ("7.5",)), (0, ())],
)
def test_version_and_gpus_are_read_from_the_first_bytes(tmp_path, mask, capabilities):
    (tmp_path / "plan").write_bytes(header(mask) + b"rest")
    assert read_header(tmp_path / "plan") == PlanHeader("1.7.1.116", capabilities)


@pytest.mark.parametrize("data", [b"", header(0x7E)[:63], header(0x7E, b"ftrt"), bytes(64)])
def test_other_files_have_no_header(tmp_path, data):
    (tmp_path / "plan").write_bytes(data)
    assert read_header(tmp_path / "plan") is None
