"""Do nn.RNN and rnn_ext.RNN compute what the equation says? Three timesteps by hand, beside both.

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

The loop itself is `unroll` in rnn_ext/by_hand.py.
"""

from rnn_ext import by_hand

result = by_hand.compare()
for t in range(len(result.input)):
    print(f"Time step {t} =>")
    print("   Input           :", result.input[t].tolist())
    print("   Output (by hand):", result.by_hand[t].tolist())
    print("   torch.nn.RNN    :", result.torch_nn[t].tolist())
    print("   rnn_ext.RNN     :", result.rnn_ext[t].tolist())
print(f"Largest difference: {result.difference:.1e}")

assert result.by_hand.shape == (3, 2)
assert result.difference < 1e-6  # float32 has seven digits
