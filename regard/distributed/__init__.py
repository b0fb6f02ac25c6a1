"""Attention over sequences that are divided among the ranks of a group of `torch.distributed`."""

from regard.distributed.attention import attention
from regard.distributed.shards import SequenceShards

__all__ = ["SequenceShards", "attention"]
