"""Mamba trains on a CPU: selective copying, the task that needs a state which chooses what to remember."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mamba_scan import Mamba

SYMBOLS, KEPT, LENGTH = 8, 6, 48
NOISE, ASK = SYMBOLS, SYMBOLS + 1


def batch(size, generator):
    """Noise with a few symbols at drawn places, then as many questions; the answers are the symbols in order."""
    places = torch.rand(size, LENGTH, generator=generator).argsort(1)[:, :KEPT].sort(1)[0]
    symbols = torch.randint(SYMBOLS, (size, KEPT), generator=generator)
    tokens = torch.full((size, LENGTH + KEPT), NOISE)
    tokens[:, LENGTH:] = ASK
    return tokens.scatter(1, places, symbols), symbols


class Model(nn.Module):
    def __init__(self, width=64, layers=2):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS + 2, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(layers + 1))
        self.blocks = nn.ModuleList(Mamba(width, d_state=16) for _ in range(layers))
        self.head = nn.Linear(width, SYMBOLS)

    def forward(self, tokens):
        x = self.embed(tokens)
        for norm, block in zip(self.norms, self.blocks, strict=False):
            x = x + block(norm(x))
        return self.head(self.norms[-1](x[:, -KEPT:]))


@pytest.mark.slow
def test_selective_copying_is_learned_within_minutes():
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model, steps = Model(), 3000
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    accuracy = 0.0
    for step in range(steps):
        tokens, symbols = batch(64, generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), symbols.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            with torch.no_grad():
                tokens, symbols = batch(512, torch.Generator().manual_seed(2))
                accuracy = (model(tokens).argmax(-1) == symbols).float().mean().item()
            print(f"step {step + 1}: loss {loss.item():.3f}, accuracy {accuracy:.3f}")
            if accuracy > 0.97:
                break
    assert accuracy > 0.95
