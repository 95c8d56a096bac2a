"""A recurrent policy with TorchRL's keys: acts one timestep at a time, learns from whole rollouts in one call.

A signal is shown at the first timestep of an episode only; every action that repeats it is rewarded.
"""

import torch
from torch import nn
from torch.distributions import Categorical

import rnn_ext

torch.manual_seed(0)
N, L, H = 32, 24, 16  # environments, timesteps of a rollout, hidden units
STATES = ("recurrent_state_h", "recurrent_state_c")  # (N, layers, H)


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = rnn_ext.LSTM(2, H, batch_first=True)
        self.head = nn.Linear(H, 2)

    def forward(self, data):
        """One timestep: observation (N, 2), is_init (N, 1)."""
        state = tuple(torch.where(data["is_init"], 0, data[key].transpose(0, 1)) for key in STATES)
        output, state = self.lstm.step(data["observation"], state)
        data["logits"] = self.head(output)
        for key, s in zip(STATES, state, strict=True):
            data["next", key] = s.transpose(0, 1)
        return data

    def rollout_logits(self, observation, is_init, state):
        """A rollout: observation (N, L, 2), is_init (N, L, 1). No loop over time, no splitting where episodes begin."""
        output, _ = self.lstm(observation, tuple(s.transpose(0, 1) for s in state), resets=is_init.squeeze(-1))
        return self.head(output)


policy = Policy()
optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
data = {"is_init": torch.ones(N, 1, dtype=torch.bool), **{key: torch.zeros(N, 1, H) for key in STATES}}
signal = torch.zeros(N, dtype=torch.long)
for _iteration in range(40):
    steps = []
    for _ in range(L):
        signal = torch.where(data["is_init"].squeeze(1), torch.randint(2, (N,)), signal)
        data["observation"] = nn.functional.one_hot(signal, 2) * data["is_init"].float()
        with torch.no_grad():
            data["action"] = Categorical(logits=policy(data)["logits"]).sample()
        data["reward"] = (data["action"] == signal).float()
        steps.append(data)
        data = {"is_init": torch.rand(N, 1) < 0.1, **{key: data["next", key] for key in STATES}}
    rollout = {key: torch.stack([step[key] for step in steps], 1) for key in steps[0] if key not in STATES}
    logits = policy.rollout_logits(rollout["observation"], rollout["is_init"], [steps[0][key] for key in STATES])
    torch.testing.assert_close(logits, rollout["logits"])  # what it acted on, now with gradients
    optimizer.zero_grad()
    (-Categorical(logits=logits).log_prob(rollout["action"]) * (rollout["reward"] - 0.5)).mean().backward()
    optimizer.step()
print(f"mean reward in the last of 40 rollouts: {rollout['reward'].mean():.2f}")
assert rollout["reward"].mean() > 0.9
