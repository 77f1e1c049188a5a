"""What `convattn doctor` says."""

import pytest

from convattn import cli, ops
from convattn.ops import doctor
from convattn.ops.cpu import library


def said() -> dict[str, str]:
    return {name.strip(): words for name, words in doctor.status()}


@pytest.mark.skipif(library.WHY_NOT is not None, reason="no fused operators")
def test_what_serves_what() -> None:
    found = said()
    assert found["cpu"].startswith(("fused operators, AVX2: ", "fused operators, portable: "))
    assert found["float32"] == found["bfloat16"] == "served by cpu"
    assert "rides along" in found["batch norms"] and "convattn::gated" in found["torch.compile"]
    assert "served by reference, since cpu is not: it is for float32 and bfloat16, not for float64" in found["float64"]


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "LOADED", None)
    monkeypatch.setattr(library, "WHY_NOT", "it was not compiled")
    found = said()
    assert found["cpu"] == "fused operators are not used: it was not compiled"
    assert found["float32"] == "served by reference, since cpu is not: it was not compiled"
    assert found["batch norms"] == "run by themselves" and found["torch.compile"] == "compiles all of it itself"


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    with ops.use("reference"):
        found = said()
    assert "OMP_WAIT_POLICY=PASSIVE slows" in found["threads"]
    assert found["large pages"].startswith("on (THP_MEM_ALLOC_ENABLE=1") and "OMP_NUM_THREADS=1" in found["threads"]
    assert found["asked for"] == "reference"
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    assert said()["large pages"].startswith("off: ")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    out = capsys.readouterr().out
    assert (ended.value.code or 0) == 0
    assert [line.split()[0] for line in out.splitlines()][:2] == ["PyTorch", "asked"]
    assert "CUDA" in out
