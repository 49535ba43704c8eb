"""Teaching the text encoders what captions say, before any picture: cheap, and the transformer then learns faster.

Readers answer questions about the scene from the encoders' output: for each shape, is there one, of which colour, where
and how large; and what is behind. They are thrown away afterwards. What a caption leaves out cannot be known, so the
loss does not go to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tools.sample_model.average import MasterWeights
from tools.sample_model.drawing import THING_FIELDS
from tools.sample_model.networks import POOLED_WIDTH, TEXT_WIDTH
from tools.sample_model.palette import BACKGROUNDS, SHAPES
from tools.sample_model.ranks import Clock
from tools.sample_model.train_flow import Networks, encode_text

THING_ANSWERS = 7
"""There or not, red, green, blue, x, y, radius."""
BACKGROUND_ANSWERS = len(BACKGROUNDS) + 6
"""Which kind, and two colours."""
PEAK_RATE = 1.5e-3
HEADS = 4


class Reader(nn.Module):
    """Reads answers from T5's tokens, a question for each shape and one for the background, and from CLIP's vector."""

    def __init__(self) -> None:
        super().__init__()
        self.questions = nn.Parameter(torch.randn(len(SHAPES) + 1, TEXT_WIDTH) * 0.1)
        self.look = nn.MultiheadAttention(TEXT_WIDTH, HEADS, batch_first=True)
        self.thing = _answers(TEXT_WIDTH, THING_ANSWERS)
        self.background = _answers(TEXT_WIDTH, BACKGROUND_ANSWERS)
        self.pooled = _answers(POOLED_WIDTH, len(SHAPES) * THING_ANSWERS + BACKGROUND_ANSWERS)

    def forward(self, tokens: Tensor, pooled: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Twice: things (batch, shapes, 7) and background (batch, 11), from the tokens and from the vector."""
        questions = self.questions.expand(len(tokens), -1, -1)
        seen = questions + self.look(questions, tokens, tokens, need_weights=False)[0]
        flat = self.pooled(pooled)
        things = flat[:, : len(SHAPES) * THING_ANSWERS].unflatten(1, (len(SHAPES), THING_ANSWERS))
        return [
            (self.thing(seen[:, :-1]), self.background(seen[:, -1])),
            (things, flat[:, len(SHAPES) * THING_ANSWERS :]),
        ]


def train_text(
    networks: Networks, rows: Tensor, clip_ids: Tensor, t5_ids: Tensor, *, minutes: float, batch: int
) -> float:
    """Train both encoders for that long on scenes' `rows` and token ids (scenes, captions, tokens).

    Returns the share of shapes told rightly as there or not there, from the tokens, over the last batches.
    """
    device = next(networks.t5.parameters()).device
    reader = Reader().to(device, next(networks.t5.parameters()).dtype)
    weights = MasterWeights(nn.ModuleList([networks.t5, networks.clip, reader]), PEAK_RATE, weight_decay=0.01)
    clock, share, right = Clock(minutes), 0.0, 0.0
    while share < 1:
        share = clock.share()
        index = torch.randint(len(rows), (batch,))
        variant = torch.randint(clip_ids.shape[1], (batch,))
        text = encode_text(networks, clip_ids[index, variant].to(device), t5_ids[index, variant].to(device))
        things, background = answers(rows[index].to(device))
        read = reader(*text)
        loss = sum((_loss(seen, things, background) for seen in read), start=torch.zeros((), device=device))
        weights.schedule(share)
        weights.step(loss)
        if weights.steps % 50 == 1:
            told = ((read[0][0][..., 0] > 0) == (things[..., 0] > 0)).float().mean().item()
            right += (told - right) * (0.3 if weights.steps > 1 else 1.0)
        if weights.steps % 500 == 1:
            print(f"text step {weights.steps} share {share:.2f} loss {loss.item():.4f} right {right:.4f}", flush=True)
    return right


def answers(rows: Tensor) -> tuple[Tensor, Tensor]:
    """What is true of scenes: things (scenes, shapes, 7) and background (scenes, 11)."""
    things = torch.zeros(len(rows), len(SHAPES), THING_ANSWERS, device=rows.device)
    scene = torch.arange(len(rows), device=rows.device)
    for start in (THING_FIELDS, 0):
        fields = rows[:, start : start + THING_FIELDS]
        there = fields[:, 6] > 0
        truth = torch.cat([torch.ones_like(fields[:, :1]), fields[:, 1:7]], dim=1)
        things[scene[there], fields[there, 0].long()] = truth[there]
    behind = rows[:, 2 * THING_FIELDS :]
    kind = nn.functional.one_hot(behind[:, 0].long(), len(BACKGROUNDS)).float()
    return things, torch.cat([kind, behind[:, 1:7]], dim=1)


def _loss(read: tuple[Tensor, Tensor], things: Tensor, background: Tensor) -> Tensor:
    seen, behind = (part.float() for part in read)
    there = things[..., 0]
    exists = nn.functional.binary_cross_entropy_with_logits(seen[..., 0], there)
    details = ((seen[..., 1:] - things[..., 1:]).square().mean(dim=-1) * there).sum() / there.sum().clamp(min=1)
    kinds = len(BACKGROUNDS)
    kind = nn.functional.cross_entropy(behind[:, :kinds], background[:, :kinds])
    colours = (behind[:, kinds:] - background[:, kinds:]).square().mean()
    total: Tensor = 5 * exists + 10 * details + 0.3 * kind + 5 * colours
    return total


def _answers(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, count))
