"""
A quick estimate of a layout's needs, which selects the layouts to rehearse from many. No torch.

One rank of a pipeline, with few shards and replicas, represents all: messages have the same sizes for any number of shards, the
optimizer's state divides by it, and a pipeline holds the activations of several micro-batches at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter

from shoal.config.layout import Layout
from shoal.config.options import Config
from shoal.plan.fits import Need, need_of
from shoal.plan.rehearse.work import Op, Work

SHARDED = ("parameters", "moments")
FEW = (2, 3)  # blocks of a stage that are rehearsed


def sketch(config: Config, layout: Layout, *, cuda: bool) -> Need:
    """Return about what a rank of `config` in `layout` needs; see `need_of`."""
    train, model = config.train, config.model
    turns = math.ceil(train.global_batch / train.micro_batch / layout.dp)
    few = Layout(dp_replicate=min(2, layout.dp_replicate), dp_shard=min(2, layout.dp_shard), cp=layout.cp, tp=layout.tp)
    alike = dataclasses.replace(
        config,
        model=dataclasses.replace(model, num_layers=math.ceil(model.num_layers / layout.pp)),
        train=dataclasses.replace(train, global_batch=train.micro_batch * turns * few.dp),
        parallel=dataclasses.replace(config.parallel, pp_schedule="1f1b", pp_stages=None, **dataclasses.asdict(few)),
    )
    need = _once(alike, few, cuda)
    held = 1 if layout.pp == 1 else turns if config.parallel.pp_schedule == "gpipe" else min(turns, layout.pp)
    fewer = layout.dp_shard / few.dp_shard
    parts = {
        part: int(size / fewer if part in SHARDED else size * held if part == "activations" else size)
        for part, size in need.parts.items()
    }
    [work] = need.works
    once = Counter({Op(op.kind, tuple(max(1, int(s / fewer)) for s in op.sizes)): n for op, n in work.once.items()})
    return Need(config, layout, parts, [Work(work.done, once, work.messages)])


@functools.lru_cache(maxsize=4096)
def _once(config: Config, layout: Layout, cuda: bool) -> Need:
    return need_of(config, layout, cuda=cuda, few=FEW)
