"""Weights of 8 bits for inference: a quarter of the memory, and much less time where a layer waits for its weights."""

import copy
import io
import timeit

import torch
from torch import nn

import rnn_ext

torch.manual_seed(0)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, 256)
        self.lstm = nn.LSTM(256, 512, num_layers=2, batch_first=True)
        self.fc = nn.Linear(512, 10)

    def forward(self, words):
        return self.fc(self.lstm(self.embedding(words))[0])


def size(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getvalue()) / 2**20


def seconds(model):
    return min(timeit.repeat(lambda: model(words), number=1, repeat=8))


model = rnn_ext.convert(Tagger().eval())
words = torch.randint(0, 1000, (1, 100))
small = rnn_ext.quantize(copy.deepcopy(model))  # in place: what is copied stays as it is

with torch.inference_mode():
    difference = (small(words).softmax(-1) - model(words).softmax(-1)).abs().max().item()
    faster = seconds(model) / seconds(small)
print(f"{size(model):.1f} MiB are {size(small):.1f}; {faster:.1f} times as fast as our float32 layers")
print(f"probabilities differ by {difference:.0e}")
assert difference < 0.01

# A checkpoint goes into a model that is quantized, too.
other = rnn_ext.quantize(Tagger().eval())
other.load_state_dict(small.state_dict())
assert torch.equal(other(words), small(words))

# The rounded weights in float32 layers, for ONNX or more training.
floats = rnn_ext.dequantize(copy.deepcopy(small))
torch.testing.assert_close(floats(words), small(words), rtol=0, atol=1e-4)
