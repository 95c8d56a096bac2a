"""Each cell in a few lines of PyTorch: the oracle that every kernel is held against.

Nothing here is fast. Everything here is differentiable any number of times and works in any dtype, on any device and
under every ``torch.func`` transform, which is why what the kernels do not differentiate is computed with it too.

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


def lstm(
    igates: Tensor, hgates: Tensor, state: State, weight_norm_c: Tensor | None = None, bias_norm_c: Tensor | None = None
) -> State:
    i, f, g, o = (igates + hgates).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c if weight_norm_c is None else layer_norm(c, weight_norm_c, bias_norm_c)), c


def gru(igates: Tensor, hgates: Tensor, state: State) -> State:
    i_r, i_z, i_n = igates.chunk(3, -1)
    h_r, h_z, h_n = hgates.chunk(3, -1)
    r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
    n = torch.tanh(i_n + r * h_n)
    return ((1 - z) * n + z * state[0],)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Layer normalisation (Ba, Kiros and Hinton 2016) of the last dimension."""
    d = x - x.mean(-1, keepdim=True)
    y = d * torch.rsqrt(d.square().mean(-1, keepdim=True) + 1e-5) * weight
    return y if bias is None else y + bias


def zoneout(keep: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Zoneout (Krueger et al. 2017): of the state, the share ``keep`` stays what it was."""
    keep = keep.to(after.dtype)
    return keep * before + (1 - keep) * after


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
    """One direction of one layer, as torch.nn names them: (G*H, I), (G*H, P or H), (G*H,), (G*H,), (P, H).

    Where the gates and the cell state of an LSTM are normalised, those of that follow: (G*H,), (G*H,), (H,), (H,).
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    weight_hr: Tensor | None = None
    weight_norm_ih: Tensor | None = None
    weight_norm_hh: Tensor | None = None
    weight_norm_c: Tensor | None = None
    bias_norm_c: Tensor | None = None


class Masks(NamedTuple):
    """What holds a state or drops it; differentiated with respect to the states alone."""

    hidden_mask: Tensor | None = None  # (.., N, P or H): factors of h before the recurrent product
    zoneout_h: Tensor | None = None  # (L, N, P or H): the share of h that stays what it was before the timestep
    zoneout_c: Tensor | None = None  # (L, N, H): the same of c


NO_MASKS = Masks()


def split_weights(weights: Sequence[Tensor], directions: int) -> list[LayerWeights]:
    """Name the flat weights of one layer, told apart by their number: 2 to 5 a direction (3 is no bias, projected),
    with layer normalisation 6 to 9."""
    total, rest = divmod(len(weights), directions)
    count = total - 4 if total > 5 else total
    if rest or not 2 <= count <= 5:
        raise ValueError(
            f"expected 2 to 5 weights (6 to 9 with layer normalisation) for each of {directions} directions, got "
            f"{len(weights)} in all"
        )
    layers = []
    for d in range(directions):
        part = list(weights[d * total : d * total + count])
        norm = weights[d * total + count : (d + 1) * total]
        weight_hr = part.pop() if count in (3, 5) else None
        biases = part[2:] if count >= 4 else [None, None]
        layers.append(LayerWeights(part[0], part[1], biases[0], biases[1], weight_hr, *norm))
    return layers


def variant_of(weights: int, masked: bool) -> int:
    """Which variant of a cell so many weights a direction and masks make: 0 plain, 1 masked, 2 with layer normalisation
    (csrc/cpu/layer.h, csrc/cuda/launch.h)."""
    return 2 if weights > 5 else 1 if masked else 0


def scan(
    cell: str,
    input: Tensor,
    state: State,
    weights: LayerWeights,
    active: Tensor | None,
    resets: Tensor | None = None,
    reverse: bool = False,
    masks: Masks = NO_MASKS,
) -> tuple[Tensor, State, Tensor | None]:
    """One direction over all timesteps.

    Args:
        cell: a key of :data:`CELLS`.
        input: (L, N, I).
        state: ``(h_0,)`` or ``(h_0, c_0)``, (N, P or H) and (N, H).
        weights: of this direction.
        active: (L, N) bool, True where the timestep exists; elsewhere the state stands still and the output is zero.
            None: all exist.
        resets: (L, N) bool, True where an independent sequence begins (the state before it is zero).
        reverse: run from the last timestep to the first.
        masks: of this direction.

    Returns:
        output (L, N, P or H), the final state, and the cell states (L, N, H) of a cell that has them.
    """
    step = CELLS[cell].step
    linear = torch.nn.functional.linear
    normed = weights.weight_norm_c is not None

    def gates(x: Tensor, weight: Tensor, norm: Tensor | None, bias: Tensor | None) -> Tensor:
        return layer_norm(linear(x, weight), norm, bias) if normed else linear(x, weight, bias)

    visible = input if active is None else torch.where(active.unsqueeze(-1), input, 0)
    # Not indexed: a gradient of each timestep alone is zeros for all the others.
    igates = gates(visible, weights.weight_ih, weights.weight_norm_ih, weights.bias_ih).unbind(0)
    norm_c = (weights.weight_norm_c, weights.bias_norm_c) if normed else ()
    hidden_mask = None if masks.hidden_mask is None else masks.hidden_mask.to(input.dtype)
    outputs: list[Tensor] = []
    cells: list[Tensor] = []
    length = input.shape[0]
    for t in reversed(range(length)) if reverse else range(length):
        if resets is not None:
            first = t + 1 if reverse else t  # the timestep at which the later of the two sequences begins
            if first < length:
                begins = (resets[first] if active is None else resets[first] & active[first]).unsqueeze(-1)
                state = tuple(torch.where(begins, 0, s) for s in state)
        h = state[0] if hidden_mask is None else state[0] * hidden_mask
        hgates = gates(h, weights.weight_hh, weights.weight_norm_hh, weights.bias_hh)
        new = step(igates[t], hgates, state, *norm_c)
        if weights.weight_hr is not None:
            new = (linear(new[0], weights.weight_hr), *new[1:])
        keeps = (masks.zoneout_h, masks.zoneout_c)
        new = tuple(n if k is None else zoneout(k[t], s, n) for k, s, n in zip(keeps, state, new, strict=False))
        if active is None:
            state = shown = new
        else:
            row = active[t].unsqueeze(-1)
            state = tuple(torch.where(row, n, s) for n, s in zip(new, state, strict=True))
            shown = tuple(torch.where(row, s, 0) for s in state)
        outputs.append(shown[0])
        cells += shown[1:]
    if reverse:
        outputs.reverse()
        cells.reverse()
    size = weights.weight_hh.shape[1]
    output = torch.stack(outputs) if outputs else input.new_zeros(0, input.shape[1], size)
    if not CELLS[cell].has_cell_state:
        return output, state, None
    hidden = weights.weight_hh.shape[0] // CELLS[cell].gates
    return output, state, torch.stack(cells) if cells else input.new_zeros(0, input.shape[1], hidden)


def active_mask(length: int, lengths: Tensor | None, device: torch.device) -> Tensor | None:
    """(L, N) bool: ``t < lengths[n]``; None of None."""
    if lengths is None:
        return None
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
    masks: Sequence[Tensor | None] = (),
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the op ``rnn_ext::layer`` computes (see ``rnn_ext/ops.py`` for the shapes): output, h_n, c_n, cells."""
    directions = 2 if bidirectional else 1
    sizes = None if batch_sizes is None else batch_sizes.tolist()

    def padded_sequence(sequence: Tensor) -> Tensor:
        """(L, N, ..) of what lies in the layout of the input."""
        if sizes is None:
            return sequence.transpose(0, 1) if batch_first else sequence
        parts = sequence.split(sizes)
        return torch.stack([torch.cat([s, s.new_zeros(sizes[0] - s.shape[0], *s.shape[1:])]) for s in parts])

    padded = padded_sequence(input)
    length, batch = padded.shape[:2]
    if sizes is not None:
        lengths = torch.tensor([sum(size > n for size in sizes) for n in range(batch)], device="cpu")
    if resets is not None:
        resets = padded_sequence(resets)
    hidden_mask, *zoneouts = masks or (None, None, None)
    zoneouts = [None if z is None else padded_sequence(z).chunk(directions, -1) for z in zoneouts]
    active = active_mask(length, lengths, input.device)
    parts = []
    for d, w in enumerate(split_weights(weights, directions)):
        hidden = w.weight_hh.shape[0] // CELLS[cell].gates
        h = h_0[d] if h_0 is not None else input.new_zeros(batch, w.weight_hh.shape[1])
        state: State = (h,)
        if CELLS[cell].has_cell_state:
            state = (h, c_0[d] if c_0 is not None else input.new_zeros(batch, hidden))
        of_direction = Masks(*(None if m is None else m[d] for m in (hidden_mask, *zoneouts)))
        parts.append(scan(cell, padded, state, w, active, resets, reverse=d == 1, masks=of_direction))
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
