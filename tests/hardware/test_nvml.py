from __future__ import annotations

from pathlib import Path

import pynvml
import pytest

from autoflux.hardware import nvml
from tests.hardware.fakes import GB, FakeCard, FakeNvml, write

ASKED = [name for name in vars(FakeNvml) if name.startswith("nvml")]
TWO = [FakeCard(uuid="GPU-aaaa"), FakeCard(name="Fake 3060", uuid="GPU-bbbb")]


def test_a_card_as_reported():
    report = nvml.read(FakeNvml())
    assert (report.driver, report.cuda, report.problems) == ("580.1", "13.1", ())
    (card,) = report.cards
    assert (card.name, card.uuid, card.capability) == ("Fake 4090", "GPU-aaaa", "8.9")
    assert (card.total_bytes, card.free_bytes) == (24 * GB, 23 * GB)
    assert (card.pcie_generation, card.pcie_width, card.current_generation) == (4, 16, 1)
    assert card.busy_share == 0


@pytest.mark.parametrize("function", ASKED)
@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_GPU_IS_LOST]
)
def test_any_single_question_may_fail(function: str, code: int):
    report = nvml.read(FakeNvml(errors={function: code}))
    if function in ("nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"):
        assert report.cards == ()
    else:
        assert len(report.cards) == 1
    asked_of_mig_only = "MigDevice" in function
    if code == pynvml.NVML_ERROR_NOT_SUPPORTED and function != "nvmlInit":
        assert report.problems == ()
    elif not asked_of_mig_only and function != "nvmlShutdown":
        assert len(report.problems) == 1


def test_a_lost_card_is_said_once_with_a_hint():
    lost = dict.fromkeys(
        (name for name in ASKED if name.startswith("nvmlDeviceGet") and name != "nvmlDeviceGetCount"),
        pynvml.NVML_ERROR_GPU_IS_LOST,
    )
    del lost["nvmlDeviceGetHandleByIndex"]
    (problem,) = nvml.read(FakeNvml(errors=lost)).problems
    assert "lost" in problem.message.lower()
    assert "reboot" in (problem.hint or "")


def test_functions_that_an_old_package_lacks_are_not_told():
    class Old:
        def nvmlInit(self): ...  # noqa: N802

        def nvmlDeviceGetCount(self):  # noqa: N802
            return 1

        def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
            return index

    (card,) = nvml.read(Old()).cards
    assert card == nvml.Card(index=0, name="NVIDIA card 0")


def test_no_driver_is_no_problem_without_a_card(tmp_path: Path):
    library = FakeNvml(errors={"nvmlInit": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND})
    write(tmp_path, {"sys/bus/pci/devices/1/vendor": "0x8086\n", "sys/bus/pci/devices/1/class": "0x030000\n"})
    assert nvml.read(library, tmp_path) == nvml.Report()


def test_no_driver_beside_a_card_is_one(tmp_path: Path):
    library = FakeNvml(errors={"nvmlInit": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND})
    write(tmp_path, {"sys/bus/pci/devices/1/vendor": "0x10de\n", "sys/bus/pci/devices/1/class": "0x030000\n"})
    (problem,) = nvml.read(library, tmp_path).problems
    assert "--gpus all" in (problem.hint or "")


def test_a_driver_updated_while_running():
    library = FakeNvml(errors={"nvmlInit": pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH})
    (problem,) = nvml.read(library).problems
    assert "reboot" in (problem.hint or "")


def test_slices_of_a_card_stand_for_it():
    parts = (FakeCard("Fake MIG 1g", "MIG-1", 10 * GB, 9 * GB), FakeCard("Fake MIG 2g", "MIG-2", 20 * GB, 19 * GB))
    cards = nvml.read(FakeNvml([FakeCard(parts=parts)])).cards
    assert [(card.uuid, card.total_bytes) for card in cards] == [("MIG-1", 10 * GB), ("MIG-2", 20 * GB)]


def test_exclusive_mode_is_told():
    (problem,) = nvml.read(FakeNvml(compute_mode=pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS)).problems
    assert "one process" in problem.message


@pytest.mark.parametrize(
    ("setting", "uuids"),
    [
        (None, ["GPU-aaaa", "GPU-bbbb"]),
        ("", []),
        ("-1", []),
        ("1", ["GPU-bbbb"]),
        ("1,0", ["GPU-bbbb", "GPU-aaaa"]),
        ("0,7,1", ["GPU-aaaa"]),
        ("0,0", ["GPU-aaaa"]),
        ("GPU-b", ["GPU-bbbb"]),
        ("GPU-", []),
        ("nonsense,0", []),
    ],
)
def test_visible_cards(setting: str | None, uuids: list[str]):
    cards = nvml.read(FakeNvml(TWO)).cards
    assert [card.uuid for card in nvml.visible(cards, setting)] == uuids


def test_torch_writes_uuids_without_prefix():
    cards = nvml.read(FakeNvml(TWO)).cards
    assert nvml.by_uuid(cards, "bbbb") == nvml.by_uuid(cards, "GPU-BBBB") == cards[1]
    assert nvml.by_uuid(cards, None) is None
