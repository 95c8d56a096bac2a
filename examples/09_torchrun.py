"""How do I train on several processes? As any model: DistributedDataParallel around it, and torchrun to start.

    torchrun --standalone --nproc-per-node 2 examples/09_torchrun.py

Without torchrun it is one process, which learns the same: the processes share each batch.
"""

import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # before the process group, which it would keep alive until exit, and its threads with it
from torch.nn.parallel import DistributedDataParallel

import rnn_ext

if distributed := "RANK" in os.environ:
    dist.init_process_group("gloo")
rank, processes = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
torch.manual_seed(0)  # the same data and the same first weights in every process


def sentences(count, words=12, vocabulary=20):
    """Of the tokens 1 (good), 2 (bad) and others, in sentences of any length: is more good than bad?"""
    lengths = torch.randint(1, words + 1, (count,))
    text = torch.randint(1, vocabulary, (count, words)).masked_fill(torch.arange(words) >= lengths[:, None], 0)
    text[torch.rand(count, words).lt(0.3) & text.ne(0)] = 1
    text[torch.rand(count, words).lt(0.3) & text.ne(0)] = 2
    return text, lengths, (text.eq(1).sum(1) > text.eq(2).sum(1)).float()


text, lengths, labels = sentences(1024)
model = classifier = rnn_ext.models.BiLSTMClassifier(vocab_size=20, embed_dim=16, rnn_hidden_size=24, fc_hidden_size=16)
if distributed:
    model = DistributedDataParallel(classifier)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

for _epoch in range(8):
    for batch in torch.randperm(len(text)).split(128):
        mine = batch[rank::processes]
        probability = model(text[mine], lengths[mine])
        loss = torch.nn.functional.binary_cross_entropy(probability.squeeze(1), labels[mine])
        optimizer.zero_grad()
        loss.backward()  # DDP averages the gradients while it runs
        optimizer.step()

classifier.eval()
text, lengths, labels = sentences(500)
with torch.no_grad():
    correct = float((classifier(text, lengths).squeeze(1).gt(0.5) == labels.bool()).float().mean())
assert correct > 0.9
if rank == 0:
    print(f"{processes} process(es): {correct:.1%} of 500 new sentences classified correctly")
if distributed:
    totals = [torch.zeros((), dtype=torch.float64) for _ in range(processes)]
    dist.all_gather(totals, sum(p.detach().double().sum() for p in classifier.parameters()))
    assert all(torch.equal(t, totals[0]) for t in totals)  # the processes still hold one model
    del model  # which holds the process group
    dist.destroy_process_group()
