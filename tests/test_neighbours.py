"""Other people's packages work with these layers as with torch.nn's. Skipped where such a package is not installed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from util import check_gradients, check_values

import rnn_ext

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
N, L, I, H = 4, 11, 3, 6  # noqa: E741


def test_torchrl_module_with_resets():
    """torchrl's LSTMModule splits and pads a batch where episodes begin; resets= does not need to."""
    tensordict, modules = pytest.importorskip("tensordict"), pytest.importorskip("torchrl.modules")
    module = modules.LSTMModule(I, H, num_layers=2, in_key="x", out_key="y").double()
    observation, is_init = torch.randn(N, L, I, dtype=torch.float64), torch.rand(N, L, 1) < 0.3
    data = tensordict.TensorDict({"x": observation, "is_init": is_init}, batch_size=[N, L])
    with modules.set_recurrent_mode(True):
        expected = module(data)["y"]
    rnn_ext.convert(module)
    assert type(module.lstm) is rnn_ext.LSTM
    check_values({"y": module.lstm(observation, resets=is_init.squeeze(-1))[0]}, {"y": expected})
    state = [torch.zeros(N, 2, H, dtype=torch.float64) for _ in "hc"]  # and a timestep at a time
    for t in range(L):
        given = {"x": observation[:, t], "is_init": is_init[:, t]}
        given |= {"recurrent_state_h": state[0], "recurrent_state_c": state[1]}
        found = module(tensordict.TensorDict(given, batch_size=[N]))
        check_values({"y": found["y"]}, {"y": expected[:, t]})
        state = [found["next", "recurrent_state_h"], found["next", "recurrent_state_c"]]


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_torchrl_modules_that_ask_for_the_class(kind):
    """A layer that is no nn.LSTM torchrl takes for one of its own."""
    tensordict, modules = pytest.importorskip("tensordict"), pytest.importorskip("torchrl.modules")
    module = getattr(modules, f"{kind}Module")(I, H, in_key="x", out_key="y").double()
    given = {"x": torch.randn(N, L, I, dtype=torch.float64), "is_init": torch.rand(N, L, 1) < 0.3}
    found = []
    for _ in range(2):
        with modules.set_recurrent_mode(True):
            found.append(module(tensordict.TensorDict(dict(given), batch_size=[N, L]))["y"])
        rnn_ext.convert(module, "custom", as_subclass=True)
    check_values({"y": found[1]}, {"y": found[0]})


def test_the_policy_of_the_example_takes_a_tensordict():
    tensordict = pytest.importorskip("tensordict")
    source = (EXAMPLES / "10_recurrent_policy.py").read_text(encoding="utf-8").split("\npolicy = ")[0]
    names: dict = {}
    exec(compile(source, "10_recurrent_policy.py", "exec"), names)
    policy, size = names["Policy"](), names["H"]
    given = {"observation": torch.randn(N, 2), "is_init": torch.rand(N, 1) < 0.5}
    given |= {key: torch.randn(N, 1, size) for key in names["STATES"]}
    found, expected = policy(tensordict.TensorDict(given, batch_size=[N])), policy(dict(given))
    assert torch.equal(found["logits"], expected["logits"])
    for key in names["STATES"]:
        assert torch.equal(found["next", key], expected["next", key])


@pytest.mark.filterwarnings("ignore")  # opacus' own
def test_opacus_per_sample_gradients():
    """Opacus knows torch.nn's layers by name and any other by torch.func."""
    opacus = pytest.importorskip("opacus")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = Output(rnn_ext.GRU(I, H, batch_first=True, dtype=torch.float64))
            self.fc = nn.Linear(H, 2, dtype=torch.float64)

        def forward(self, x):
            return self.fc(self.rnn(x)[:, -1])

    class Output(nn.Module):
        """Opacus wants one tensor of each module that has parameters."""

        def __init__(self, layer):
            super().__init__()
            for name, parameter in layer.named_parameters():
                self.register_parameter(name, parameter)
            self.layer = [layer]

        def forward(self, x):
            return torch.func.functional_call(self.layer[0], dict(self.named_parameters()), (x,))[0]

    model, input = Model(), torch.randn(N, L, I, dtype=torch.float64)
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],)).cos().sum()

    expected = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, input)
    wrapped = opacus.GradSampleModule(model, loss_reduction="sum")
    wrapped(input).cos().sum().backward()
    check_gradients({name: p.grad_sample for name, p in model.named_parameters()}, expected)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice
def test_lightning_module_converted_in_one_line(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(I, H, 2, batch_first=True, bidirectional=True)
            self.fc = nn.Linear(2 * H, 1)

        def training_step(self, batch, index):
            (x,) = batch
            return (self.fc(self.rnn(x)[0]).squeeze(-1) - x.sum(-1).cumsum(1)).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    torch.manual_seed(0)
    start = Module().double()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, L, I).double()), batch_size=4)
    trained = []
    for convert in (lambda module: module, rnn_ext.convert):
        module = convert(copy.deepcopy(start))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet["enable_model_summary"] = False
        lightning.Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, **quiet).fit(module, data)
        trained.append(dict(module.named_parameters()))
    assert type(module.rnn) is rnn_ext.LSTM
    check_gradients(*trained)
    assert not torch.allclose(trained[0]["rnn.weight_hh_l0"], start.rnn.weight_hh_l0)
