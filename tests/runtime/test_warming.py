"""Warming up: everything that is computed is of sizes that can be, and what fails is nobody's concern."""

from __future__ import annotations

import logging

import pytest
import torch

from autoflux import Precision
from autoflux.runtime import warming


@pytest.mark.parametrize("narrow", [None, Precision.INT8, Precision.FLOAT8])
def test_all_of_it_can_be_computed(narrow, caplog):
    with caplog.at_level(logging.DEBUG):
        warming.warm_up(torch.device("cpu"), torch.bfloat16, narrow, 256).join()
    assert not caplog.records


def test_what_fails_is_noted_and_no_more(caplog):
    with caplog.at_level(logging.DEBUG):
        warming.warm_up(torch.device("cpu"), torch.int32, Precision.FLOAT8, 256).join()
    assert [record.message for record in caplog.records] == ["warming up failed"]
