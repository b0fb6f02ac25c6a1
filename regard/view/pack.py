"""Encoding of numbers for the page: varints of seven bits per byte, least significant first, in base64.

A weight is encoded as a varint of weight * 16383: one byte below 1/128, two above, exact to 0.00003. Over 128 keys most
weights fit in one byte, so 6 x 12 heads with all keys recorded take about 2 MB; uint16 would take 3.1 MB, JSON 8 MB.
"""

from __future__ import annotations

import base64

import torch
from torch import Tensor

from regard.view.record import Rows

ONE = 16383  # the integer that encodes the weight 1: the largest that fits in two bytes
THOUSAND = 1000  # entropy and received are encoded in thousandths


def encode_varints(numbers: Tensor) -> str:
    r"""Encode a tensor of integers, 0 <= n < 2^28, in row-major order.

    >>> encode_varints(torch.tensor([1, 300])), base64.b64decode(encode_varints(torch.tensor([1, 300])))
    ('AawC', b'\x01\xac\x02')
    """
    n = numbers.flatten().int()
    shifts = [shift for shift in (0, 7, 14, 21) if shift == 0 or bool((n >> shift).any())]
    rest = torch.stack([n >> shift for shift in shifts], -1)  # the bits from each byte on
    more = torch.cat([rest[:, 1:] > 0, torch.zeros(len(n), 1, dtype=torch.bool)], -1)
    parts = (rest & 127) + 128 * more
    used = parts[torch.cat([torch.ones(len(n), 1, dtype=torch.bool), more[:, :-1]], -1)].to(torch.uint8)
    return base64.b64encode(bytes(used.tolist())).decode("ascii")


def quantize(numbers: Tensor, one: int) -> Tensor:
    """Round `numbers` >= 0 to integers, with 1 as `one`; NaN and inf become 0.

    >>> quantize(torch.tensor([0.5, float("nan")]), 1000).tolist()
    [500, 0]
    """
    return (numbers.nan_to_num(0.0, posinf=0.0).clamp(min=0) * one).round().long()


def encode_rows(rows: Rows, limit: int) -> list[str]:
    """Encode the rows of every head: weights and keys (H, L, k) as H strings.

    A row is a varint `4 n + 2 dense + complete`, followed by n entries in ascending order of keys. A dense row lists the
    keys 0..n-1 and encodes weights only; any other row encodes, before each weight, the number of keys skipped since the
    last one. At most `limit` weights per row are kept, the largest; a row that loses some is no longer complete.

    >>> from regard.view.record import rows
    >>> from regard.watch import watch
    >>> layer = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    >>> with watch(layer, top=3) as records:
    ...     _ = layer(*torch.rand(3, 1, 3, 8))
    >>> encoded = encode_rows(rows(records[0], 0), limit=3)
    >>> len(encoded), base64.b64decode(encoded[0])[0] == 4 * 3 + 2 + 1
    (2, True)
    """
    weights, keys, listed = rows.weights[..., :limit], rows.keys[..., :limit], rows.listed[..., :limit]
    complete = rows.complete & (rows.listed.sum(-1) <= limit)
    count = listed.sum(-1)
    size = int(rows.received.shape[-1])  # as a key, sorts the padding behind every key
    keys, order = torch.where(listed, keys, size).sort(-1)
    weights, listed = weights.gather(-1, order), listed.gather(-1, order)
    dense = ((keys == torch.arange(keys.shape[-1])) | ~listed).all(-1)
    before = torch.cat([torch.full_like(keys[..., :1], -1), keys[..., :-1]], -1)
    skipped = (keys - before - 1).clamp(min=0)
    entries = torch.stack([skipped, quantize(weights.clamp(max=1), ONE)], -1).flatten(-2)
    kept = torch.stack([listed & ~dense[..., None], listed], -1).flatten(-2)
    head = 4 * count + 2 * dense.long() + complete.long()
    stream = torch.cat([head[..., None], entries], -1)
    kept = torch.cat([torch.ones_like(head[..., None], dtype=torch.bool), kept], -1)
    return [encode_varints(numbers[keep]) for numbers, keep in zip(stream, kept, strict=True)]
