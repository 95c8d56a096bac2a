"""My sequences have different lengths: must I pack them? No: hand over the lengths.

In any order, a list or an integer tensor, zeros allowed. The results are those of packing, without packing.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnn_ext

torch.manual_seed(0)
lengths = [3, 7, 1, 5]  # not sorted
x = torch.randn(4, 7, 8)  # (N, L, I), padded with anything
ours = rnn_ext.LSTM(8, 16, batch_first=True, bidirectional=True)

output, (h_n, c_n) = ours(x, lengths=lengths)

# The same with torch.nn: pack, run, unpack.
theirs = nn.LSTM(8, 16, batch_first=True, bidirectional=True)
theirs.load_state_dict(ours.state_dict())
packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
packed_output, (packed_h_n, packed_c_n) = theirs(packed)
padded_output, _ = pad_packed_sequence(packed_output, batch_first=True)

torch.testing.assert_close(output, padded_output)  # zeros past each end
torch.testing.assert_close(h_n, packed_h_n)  # the state at each sequence's own end
torch.testing.assert_close(c_n, packed_c_n)

# A PackedSequence is taken as well, and the kernels run it as it is.
torch.testing.assert_close(ours(packed)[0].data, packed_output.data)

# torch.nn cannot do this one: an empty sequence. Its state stays what it was.
_, (h_n, _) = ours(x, lengths=[3, 0, 1, 5])
assert not h_n[:, 1].any()
print("lengths= equals packing, and knows empty sequences")
