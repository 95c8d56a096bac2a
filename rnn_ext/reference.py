"""Each cell in a few lines of PyTorch: the oracle that every kernel is held against.

Nothing here is fast. Everything here is differentiable any number of times and works in any dtype, on any device and
under every ``torch.func`` transform, which is why the double backward of the kernels is computed with it too.

Equations and gate order are those documented for :class:`torch.nn.RNN`, :class:`torch.nn.LSTM` and
:class:`torch.nn.GRU`. ``igates`` is ``W_ih x + b_ih``, ``hgates`` is ``W_hh h + b_hh``, both ``(N, G * H)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

State = tuple[Tensor, ...]  # (h,) or (h, c)


def rnn_tanh(igates: Tensor, hgates: Tensor, state: State) -> State:
    return (torch.tanh(igates + hgates),)


def rnn_relu(igates: Tensor, hgates: Tensor, state: State) -> State:
    return (torch.relu(igates + hgates),)


def lstm(igates: Tensor, hgates: Tensor, state: State) -> State:
    i, f, g, o = (igates + hgates).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(igates: Tensor, hgates: Tensor, state: State) -> State:
    i_r, i_z, i_n = igates.chunk(3, -1)
    h_r, h_z, h_n = hgates.chunk(3, -1)
    r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
    n = torch.tanh(i_n + r * h_n)
    return ((1 - z) * n + z * state[0],)


class Cell(NamedTuple):
    step: Callable[[Tensor, Tensor, State], State]
    gates: int
    has_cell_state: bool


CELLS: dict[str, Cell] = {
    "rnn_tanh": Cell(rnn_tanh, 1, False),
    "rnn_relu": Cell(rnn_relu, 1, False),
    "gru": Cell(gru, 3, False),
    "lstm": Cell(lstm, 4, True),
}


class LayerWeights(NamedTuple):
    """One direction of one layer, as torch.nn names them: (G*H, I), (G*H, P or H), (G*H,), (G*H,), (P, H)."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    weight_hr: Tensor | None = None


def split_weights(weights: Sequence[Tensor], directions: int) -> list[LayerWeights]:
    """Name the flat weights of one layer: 2 to 5 a direction, told apart by their number (3 is no bias, projected)."""
    count, rest = divmod(len(weights), directions)
    if rest or not 2 <= count <= 5:
        raise ValueError(f"expected 2 to 5 weights for each of {directions} directions, got {len(weights)} in all")
    layers = []
    for d in range(directions):
        part = list(weights[d * count : (d + 1) * count])
        weight_hr = part.pop() if count in (3, 5) else None
        biases = part[2:] if count >= 4 else [None, None]
        layers.append(LayerWeights(part[0], part[1], biases[0], biases[1], weight_hr))
    return layers


def scan(
    cell: str,
    input: Tensor,
    state: State,
    weights: LayerWeights,
    active: Tensor,
    resets: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, State, Tensor | None]:
    """One direction over all timesteps.

    Args:
        cell: a key of :data:`CELLS`.
        input: (L, N, I).
        state: ``(h_0,)`` or ``(h_0, c_0)``, (N, P or H) and (N, H).
        weights: of this direction.
        active: (L, N) bool, True where the timestep exists; elsewhere the state stands still and the output is zero.
        resets: (L, N) bool, True where an independent sequence begins (the state before it is zero).
        reverse: run from the last timestep to the first.

    Returns:
        output (L, N, P or H), the final state, and the cell states (L, N, H) of a cell that has them.
    """
    step = CELLS[cell].step
    linear = torch.nn.functional.linear
    igates = linear(torch.where(active.unsqueeze(-1), input, 0), weights.weight_ih, weights.bias_ih)
    outputs: list[Tensor] = []
    cells: list[Tensor] = []
    length = input.shape[0]
    for t in reversed(range(length)) if reverse else range(length):
        if resets is not None:
            first = t + 1 if reverse else t  # the timestep at which the later of the two sequences begins
            if first < length:
                begins = (resets[first] & active[first]).unsqueeze(-1)
                state = tuple(torch.where(begins, 0, s) for s in state)
        hgates = linear(state[0], weights.weight_hh, weights.bias_hh)
        new = step(igates[t], hgates, state)
        if weights.weight_hr is not None:
            new = (linear(new[0], weights.weight_hr), *new[1:])
        row = active[t].unsqueeze(-1)
        state = tuple(torch.where(row, n, s) for n, s in zip(new, state, strict=True))
        outputs.append(torch.where(row, state[0], 0))
        if len(state) == 2:
            cells.append(torch.where(row, state[1], 0))
    if reverse:
        outputs.reverse()
        cells.reverse()
    size = weights.weight_hh.shape[1]
    output = torch.stack(outputs) if outputs else input.new_zeros(0, input.shape[1], size)
    if not CELLS[cell].has_cell_state:
        return output, state, None
    hidden = weights.weight_hh.shape[0] // CELLS[cell].gates
    return output, state, torch.stack(cells) if cells else input.new_zeros(0, input.shape[1], hidden)


def active_mask(length: int, batch: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """(L, N) bool: ``t < lengths[n]``, or all True."""
    if lengths is None:
        return torch.ones(length, batch, dtype=torch.bool, device=device)
    return torch.arange(length, device=device).unsqueeze(1) < lengths.to(device).unsqueeze(0)


def layer(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    cell: str,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the op ``rnn_ext::layer`` computes (see ``rnn_ext/ops.py`` for the shapes): output, h_n, c_n, cells."""
    directions = 2 if bidirectional else 1
    if batch_sizes is not None:
        sizes = batch_sizes.tolist()
        length, batch = len(sizes), sizes[0]
        steps = input.split(sizes)
        rows = [torch.cat([s, s.new_zeros(batch - s.shape[0], s.shape[1])]) for s in steps]
        lengths = torch.tensor([sum(size > n for size in sizes) for n in range(batch)])
        padded = torch.stack(rows)
        if resets is not None:
            parts = resets.split(sizes)
            resets = torch.stack([torch.cat([part, part.new_zeros(batch - part.shape[0])]) for part in parts])
    else:
        padded = input.transpose(0, 1) if batch_first else input
        length, batch = padded.shape[:2]
        sizes = None
        if resets is not None and batch_first:
            resets = resets.transpose(0, 1)
    active = active_mask(length, batch, lengths, input.device)
    parts = []
    for d, w in enumerate(split_weights(weights, directions)):
        hidden = w.weight_hh.shape[0] // CELLS[cell].gates
        h = h_0[d] if h_0 is not None else input.new_zeros(batch, w.weight_hh.shape[1])
        state: State = (h,)
        if CELLS[cell].has_cell_state:
            state = (h, c_0[d] if c_0 is not None else input.new_zeros(batch, hidden))
        parts.append(scan(cell, padded, state, w, active, resets, reverse=d == 1))
    outputs, states, cells = zip(*parts, strict=True)

    def gather(tensors: Sequence[Tensor]) -> Tensor:
        joined = torch.cat(tensors, -1)
        if sizes is not None:
            return torch.cat([joined[t, :size] for t, size in enumerate(sizes)])
        return joined.transpose(0, 1) if batch_first else joined

    has_cell = CELLS[cell].has_cell_state
    return (
        gather(outputs),
        torch.stack([s[0] for s in states]),
        torch.stack([s[1] for s in states]) if has_cell else None,
        gather([c for c in cells if c is not None]) if has_cell else None,
    )
