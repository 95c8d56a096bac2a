"""A real pretrained BiLSTM: g2pM's Chinese polyphone disambiguation, beside the numpy code that it is shipped with.

The wheel is fetched through the user's pip, held against its hash and kept in rnn_ext's cache folder; offline and not
yet cached, the tests are skipped. Its weights are licensed under Apache 2.0 and are not redistributed here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import rnn_ext
from rnn_ext.datasets import cache_folder, replacing

PACKAGE = "g2pM==0.1.2.5"
WHEEL = "g2pM-0.1.2.5-py3-none-any.whl"
SHA256 = "9e920b82df4002f96d8679720c7a858d10816d438dbd61b8b6b621a80a976361"

# Characters with several readings in ordinary use, one to thirty characters a sentence.
SENTENCES = """
他红了二十年以后竟退出了大家的视线。 银行行长走在人行道上。 我长大以后想当校长。 这件衣服的长度比那件长。
音乐让我很快乐。 他还没有把书还给我。 请重新称一下这个箱子的重量。 我觉得睡觉很重要。 会计说开会的时间已经过了。
他们为了和平而和好。 都市里的人都很忙。 小明的头发发黄了。 干燥的天气里要干活。 她背着背包背诵课文。 老师教我们写字。
教室里很安静。 我们参加了会议。 人参是一种药材。 他得了第一名还得继续努力。 这种种子很难种。 大夫说他的病不要紧。
天空中有空位吗。 请把门关上。 难民遇到了很多困难。 他应该答应了。 相片里的人互相看着对方。 数学课上老师让我们数数。
大家都喜欢他好客的性格。 爱好运动的人身体好。 车间里的工人中间休息。 树叶落下来了。 他把钥匙落在家里。
降落伞从天上降下来。 敌人投降了。 朝阳照着朝鲜半岛。 他转身看见轮子在转。 调查员调整了音调。 子弹从弹簧里弹出来。
奇数和偶数真奇怪。 我差点出差。 成绩参差不齐。 藏族人把宝藏藏在西藏。 单于姓单。 便宜的东西不一定方便。
我的目的地是北京。 你的确说得对。 地上的草长得慢慢地高了。 了解情况以后他走了。 着火了他着急得睡不着。
看着门的人叫看门人。 行。 一行白鹭上青天。 两个黄鹂鸣翠柳。 床前明月光。 疑是地上霜。 举头望明月。 低头思故乡。
春眠不觉晓。 处处闻啼鸟。 夜来风雨声。 花落知多少。
"""


def fetch() -> bytes:
    """The wheel, from the cache or through pip; skips the test where neither has it."""
    cached = cache_folder() / WHEEL
    data = cached.read_bytes() if cached.is_file() else b""
    if hashlib.sha256(data).hexdigest() == SHA256:
        return data
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--require-hashes",
            "--retries=1",
            "--timeout=20",
        ]
        command += ["--no-input", "--disable-pip-version-check", "-r", str(requirements), "-d", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            assert "HASH" not in done.stderr, done.stderr  # which is no lack of a network
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            pytest.skip(f"pip could not download {PACKAGE}: {errors[0] if errors else 'no word on why'}")
        data = Path(folder, WHEEL).read_bytes()
    assert hashlib.sha256(data).hexdigest() == SHA256
    with replacing(cached) as file:
        file.write(data)
    return data


@pytest.fixture(scope="module")
def g2pm(tmp_path_factory):
    """The wheel's own class, its class labels' logits recorded, and the state_dict of its network."""
    folder = tmp_path_factory.mktemp("g2pM")
    wheel = folder / WHEEL
    wheel.write_bytes(fetch())
    zipfile.ZipFile(wheel).extractall(folder)
    spec = importlib.util.spec_from_file_location("g2pM_wheel", folder / "g2pM" / "g2pM.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Recorder(module.G2pM):
        def fc_layer(self, inputs):
            self.logits = super().fc_layer(inputs)
            return self.logits

    with open(folder / "g2pM" / "np_ckpt.pkl", "rb") as file:  # trusted: its hash is pinned above
        state = {name: torch.from_numpy(np.array(value)) for name, value in pickle.load(file).items()}
    return Recorder(), state


class Network(nn.Module):
    """What the wheel computes, in torch: embedding, packed BiLSTM, two linear layers."""

    def __init__(self, lstm: nn.Module):
        super().__init__()
        self.embedding = nn.Embedding(5398, 64)
        self.lstm = lstm
        self.logit_layer = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 876))

    def forward(self, sentences: list[torch.Tensor]) -> list[torch.Tensor]:
        packed = pack_sequence([self.embedding(ids) for ids in sentences], enforce_sorted=False)
        output, lengths = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return [self.logit_layer(row[:length]) for row, length in zip(output, lengths, strict=True)]


def sentences(recorder) -> list[np.ndarray]:
    """Those above as the wheel would number them, and its whole vocabulary in pieces of 1 to 43 characters."""
    index = recorder.char2idx
    written = [
        [index["시"], *(index.get(char, index["<UNK>"]) for char in text), index["끝"]] for text in SENTENCES.split()
    ]
    known = sorted(number for number in index.values() if number > 0)
    pieces = []
    while known:
        size = len(pieces) * 7 % 43 + 1
        pieces.append(known[:size])
        known = known[size:]
    return [np.array(ids, dtype=np.int32) for ids in written + pieces]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_g2pm(g2pm, dtype):
    """Every class of every character as the wheel's own; the 876 logits to 1e-6 of the largest, which is about 70.

    (The wheel multiplies its input by weight_ih in float32 and goes on in float64.)
    """
    recorder, state = g2pm
    model = Network(rnn_ext.LSTM(64, 32, bidirectional=True, backend="custom"))
    model.load_state_dict(state, strict=True)
    model.to(dtype).eval()
    batch = sentences(recorder)
    assert len(batch) > 256 and sum(map(len, batch)) > 5398
    with torch.no_grad():
        actual = model([torch.from_numpy(ids).long() for ids in batch])
    for ids, logits in zip(batch, actual, strict=True):
        predictions = recorder.predict(ids[None], list(range(len(ids))))
        assert np.array_equal(logits.argmax(1).numpy(), predictions)
        error = np.abs(logits.double().numpy() - recorder.logits).max() / np.abs(recorder.logits).max()
        assert error <= 1e-6


def test_g2pm_converted(g2pm):
    """The same network, first torch.nn's and then ours by ``rnn_ext.convert``: the same readings."""
    recorder, state = g2pm
    model = Network(nn.LSTM(64, 32, bidirectional=True))
    model.load_state_dict(state)
    batch = [torch.from_numpy(ids).long() for ids in sentences(recorder)[:100]]
    with torch.no_grad():
        expected = model(batch)
        actual = rnn_ext.convert(model, backend="custom")(batch)
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got.argmax(1), want.argmax(1))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
