"""The session's own part: grouping, remembering prompts, errors. Pictures are tested with the real backend."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from autoflux.errors import InvalidRequest, OutOfMemory, UsageError
from autoflux.models.request import Request
from autoflux.planning.fit import batch_limit
from autoflux.runtime.prompt_cache import PromptCache
from autoflux.runtime.session import Session
from autoflux.testing import FakePipeline, fake_model, fake_plan


@dataclass
class Watched(FakePipeline):
    """A fake that counts its calls, and fails when it is told to."""

    encoded: list[str] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    fail_with: Exception | None = None

    def encode(self, prompts):
        self.encoded += prompts
        return super().encode(prompts)

    def pack(self, conditioning):
        return {"prompt": torch.zeros(1000, dtype=torch.uint8)}

    def denoise(self, states):
        if self.fail_with:
            raise self.fail_with
        self.batches.append(len(states))
        super().denoise(states)


@pytest.fixture
def pipeline() -> Watched:
    return Watched()


@pytest.fixture
def session(pipeline, tmp_path, monkeypatch) -> Session:
    monkeypatch.setenv("AUTOFLUX_CACHE_DIR", str(tmp_path))
    model = fake_model()
    return Session(pipeline, fake_plan(model), model)


def request_of(session: Session, **changes: object) -> Request:
    defaults = session.model.defaults
    plain = Request(prompt="a", seed=1, steps=2, guidance=1.0, width=defaults.width, height=defaults.height)
    return plain.replace(**changes)


def test_a_prompt_is_encoded_once_while_it_is_remembered(session, pipeline):
    session._prompts = PromptCache("encoder", memory_bytes=2000)
    for prompt in ("a", "b", "a", "c", "a", "b"):
        session.generate(prompt, seed=1)
    # `a` was used again before `c` came, so `b` was the one forgotten.
    assert pipeline.encoded == ["a", "b", "c", "b"]


def test_pictures_of_one_size_are_drawn_together_up_to_the_limit(session, pipeline):
    plan = session.plan.replace(max_batch=3)
    session = Session(pipeline, plan, session.model)
    assert batch_limit(plan, session.model, 64, 64) == 3
    requests = [request_of(session, seed=i) for i in range(5)] + [request_of(session, width=64, height=96)]
    assert sorted(map(len, session.groups(requests))) == [1, 2, 3]
    assert sorted(i for group in session.groups(requests) for i in group) == list(range(6))
    session.draw(requests)
    assert sorted(set(pipeline.batches)) == [1, 2, 3]


def test_a_picture_of_fewer_steps_leaves_the_batch_early(session, pipeline):
    pictures = session.draw([request_of(session, steps=3), request_of(session, seed=2, steps=1)])
    assert pipeline.batches == [2, 1, 1]
    assert [p.request.steps for p in pictures] == [3, 1]


def test_running_out_of_memory_is_our_error_and_the_session_goes_on(session, pipeline):
    pipeline.fail_with = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(OutOfMemory, match="ran out of memory") as caught:
        session.generate("a", seed=1)
    assert "--vram" in caught.value.hint
    pipeline.fail_with = ValueError("something else")
    with pytest.raises(ValueError, match="something else"):
        session.generate("a", seed=1)
    pipeline.fail_with = None
    assert session.generate("a", seed=1)[0].seconds >= 0


def test_a_request_is_checked_also_when_it_did_not_come_from_an_order(session):
    with pytest.raises(InvalidRequest):
        session.draw([request_of(session, steps=0)])


@pytest.mark.parametrize("order", [{"steps": "2"}, {"stepz": 2}, {"prompt": ["a", "b"]}])
def test_what_cannot_be_ordered_is_refused(session, order):
    with pytest.raises(InvalidRequest, match="cannot be ordered"):
        session.generate(**{"prompt": "a cat", **order})


def test_a_closed_session_says_so(session):
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.generate("a cat", seed=1)


def test_warming_up_encodes_and_draws_one_step_whatever_is_remembered(session, pipeline):
    session.generate("warm up", seed=1, steps=1)
    session.warm_up()
    session.warm_up()
    assert (pipeline.batches, pipeline.encoded) == ([1, 1, 1], ["warm up"] * 3)
