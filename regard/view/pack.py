"""Numbers packed small for the page: varints of seven bits a byte, least first, in base64.
 A weight is a varint of weight * 16383: one byte under 1/128, two above, exact to 0.00003. Over 128 keys most weights
fit in one byte, so 6 x 12 heads with every key known take about 2 MB; uint16 would take 3.1 MB, JSON 8 MB.
"""

from __future__ import annotations

import base64

import torch
from torch import Tensor

from regard.view.record import Rows

ONE = 16383  # the integer that stands for the weight 1: the largest that fits two bytes
THOUSAND = 1000  # entropy and received are packed in thousandths


def varints(numbers: Tensor) -> str:
    """Base64 of a flat tensor of integers >= 0, each below 2^28."""
    n = numbers.flatten().int()
    shifts = [shift for shift in (0, 7, 14, 21) if shift == 0 or bool((n >> shift).any())]
    rest = torch.stack([n >> shift for shift in shifts], -1)  # what is left to write at each byte
    more = torch.cat([rest[:, 1:] > 0, torch.zeros(len(n), 1, dtype=torch.bool)], -1)
    parts = (rest & 127) + 128 * more
    kept = parts[torch.cat([torch.ones(len(n), 1, dtype=torch.bool), more[:, :-1]], -1)].to(torch.uint8)
    return base64.b64encode(bytes(kept.tolist())).decode("ascii")


def quantised(numbers: Tensor, one: int) -> Tensor:
    """`numbers` >= 0 as integers, `one` standing for 1."""
    return (numbers.nan_to_num(0.0, posinf=0.0).clamp(min=0) * one).round().long()


def heads(rows: Rows, most: int) -> list[str]:
    """The rows of every head, packed: (H,L,k) weights and keys -> H strings.
     A row is a varint `4 n + 2 dense + complete`, then n entries in the order of the keys. A dense row lists the keys
    0..n-1 and writes weights alone; any other writes, before each weight, how many keys were skipped since.
    Only the `most` largest weights of a row are kept; a row that loses some is no longer complete.
    """
    weights, keys, listed = rows.weights[..., :most], rows.keys[..., :most], rows.listed[..., :most]
    complete = rows.complete & (rows.listed.sum(-1) <= most)
    count = listed.sum(-1)
    beyond = int(rows.received.shape[-1])  # sorts the filling behind every key
    keys, order = torch.where(listed, keys, beyond).sort(-1)
    weights, listed = weights.gather(-1, order), listed.gather(-1, order)
    dense = ((keys == torch.arange(keys.shape[-1])) | ~listed).all(-1)
    before = torch.cat([torch.full_like(keys[..., :1], -1), keys[..., :-1]], -1)
    skipped = (keys - before - 1).clamp(min=0)
    entries = torch.stack([skipped, quantised(weights.clamp(max=1), ONE)], -1).flatten(-2)
    kept = torch.stack([listed & ~dense[..., None], listed], -1).flatten(-2)
    head = 4 * count + 2 * dense.long() + complete.long()
    stream = torch.cat([head[..., None], entries], -1)
    kept = torch.cat([torch.ones_like(head[..., None], dtype=torch.bool), kept], -1)
    return [varints(numbers[keep]) for numbers, keep in zip(stream, kept, strict=True)]
