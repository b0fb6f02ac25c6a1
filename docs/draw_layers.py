"""Draw the pictures of `docs/layers.md` from outputs of the layers. `python docs/draw_layers.py` rewrites them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from regard import Summary, mask, normalizer, position
from regard import nn as layers
from regard.nn import recurrent, vision

# ---------------------------------------------------------------------------------------------------------------------
# Style of all pictures.

LIGHT, BLUE, ORANGE, INK, GREY = "#eff6ff", "#1d4ed8", "#ea580c", "#334155", "#cbd5e1"
WEIGHTS = LinearSegmentedColormap.from_list("weights", [LIGHT, "#93c5fd", BLUE])
SIGNED = LinearSegmentedColormap.from_list("signed", [ORANGE, "#ffffff", BLUE])
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7.5,
    "xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": GREY, "axes.linewidth": 0.8, "xtick.major.size": 0,
    "ytick.major.size": 0, "legend.frameon": False, "figure.facecolor": "white", "savefig.dpi": 144,
    "svg.fonttype": "path", "svg.hashsalt": "regard",
}  # fmt: skip


def grid(rows: int, columns: int, height: float, **words: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure of page width, and its axes in row-major order."""
    figure = Figure(figsize=(7.0, height), layout="compressed")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axes = figure.subplots(rows, columns, squeeze=False, **words)
    return figure, list(axes.flat)


def heat(axes: Axes, table: Tensor, title: str = "", most: float | None = None, signed: bool = False) -> None:
    """Draw a matrix as colors. Elements that are 0, such as masked weights, stay white."""
    numbers = table.detach().double()
    top = float(numbers.nan_to_num().abs().max()) if most is None else most
    shown = numbers if signed else numbers.masked_fill(numbers == 0, math.nan)
    axes.imshow(
        shown.numpy(), SIGNED if signed else WEIGHTS, vmin=-top if signed else 0.0, vmax=top, interpolation="nearest"
    )
    axes.set_title(title)
    axes.set(xticks=[], yticks=[])


def named(axes: Axes, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> None:
    """Label the rows and columns of a matrix with words."""
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns, rotation=90)


def outlined(axes: Axes, row: float, column: float, height: float = 1, width: float = 1, **words: Any) -> None:
    """Draw a frame around one or several cells of a matrix."""
    words = {"edgecolor": ORANGE, "linewidth": 1.3, "zorder": 3, **words}
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), width, height, facecolor="none", clip_on=False, **words))


def plain(axes: Axes) -> None:
    """Remove the top and right spines."""
    axes.spines[["top", "right"]].set_visible(False)


def picture(axes: Axes, x: Tensor, title: str = "") -> None:
    """Draw an image (3, H, W)."""
    axes.imshow(x.detach().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_title(title)
    axes.set(xticks=[], yticks=[])


def set_to(parameter: Tensor | None, value: Tensor | float) -> None:
    """Set a parameter by hand."""
    assert parameter is not None
    with torch.no_grad():
        parameter.copy_(torch.as_tensor(value, dtype=parameter.dtype).expand_as(parameter))


# ---------------------------------------------------------------------------------------------------------------------
# Multi-head attention.


def multihead() -> Figure:
    """Draw four masks, and four heads with ALiBi. The projections make each word attend to equal words."""
    words = ["the", "cat", "saw", "the", "dog", "and", "the", "dog", "saw", "the", "cat"]
    one_hot = nn.functional.one_hot(torch.tensor([sorted(set(words)).index(w) for w in words]), 8).float()
    x = torch.cat([one_hot, torch.zeros(len(words), 56)], 1)[None]

    def weights(allowed: mask.Mask | None, embedding: position.ALiBi | None = None) -> Tensor:
        layer = layers.MultiheadAttention(64, 8, batch_first=True, position=embedding)
        set_to(layer.in_proj_weight, 0.0)
        set_to(layer.in_proj_weight[:128, :8], 2.0 * torch.eye(8).repeat(16, 1))
        return layer(x, mask=allowed, summary=Summary(full=True))[1].full[0]

    figure, axes = grid(2, 4, 3.9)
    masks = {
        "No mask": None,
        "causal()": mask.causal(),
        "causal() & window(left=3)": mask.causal() & mask.window(left=3),
        "documents(ids)": mask.documents(torch.tensor([0] * 5 + [1] * 6)),
    }
    for ax, (name, allowed) in zip(axes, masks.items(), strict=False):
        heat(ax, weights(allowed)[0], name)
    biased = weights(mask.causal(), position.ALiBi())
    for ax, head in zip(axes[4:], (0, 1, 3, 7), strict=True):
        heat(ax, biased[head], f"ALiBi, slope 1/{2 ** (head + 1)}")
    for ax in (axes[0], axes[4]):
        named(ax, words, words if ax is axes[4] else ())
    return figure


def block() -> Figure:
    """Draw the effect of a block on a large token, and the size of tokens in a stack of blocks."""
    x = torch.randn(1, 8, 20)
    x[0, 3] *= 4
    figure, axes = grid(1, 4, 2.3, width_ratios=(1, 1, 1, 1.25))
    outs = [layers.AttentionBlock(20, 4, norm=norm).eval()(x) for norm in ("post", "pre")]
    titles = ("Query", 'After, norm="post"', 'After, norm="pre"')
    for ax, table, title in zip(axes, (x, *outs), titles, strict=False):
        heat(ax, table[0], title, most=4.0, signed=True)
        ax.set_aspect("auto")
        ax.set_xlabel("20 elements")
    axes[0].set_ylabel("8 tokens")
    for norm, color in (("post", BLUE), ("pre", ORANGE)):
        y, sizes = torch.randn(1, 64, 64), []
        for _ in range(25):
            sizes.append(float(y.detach().square().mean().sqrt()))
            y = layers.AttentionBlock(64, 4, norm=norm).eval()(y)
        axes[3].plot(sizes, color=color)
        axes[3].annotate(f' "{norm}"', (24, sizes[-1]), color=color, va="center", annotation_clip=False)
    plain(axes[3])
    axes[3].set(title="Root mean square", xlabel="Number of blocks", xticks=(0, 8, 16, 24), xlim=(0, 31), ylim=0)
    return figure


def cache() -> Figure:
    """Draw the used and allocated tokens of a cache, token by token, after a prompt of five."""
    layer, kept = layers.MultiheadAttention(32, 4, batch_first=True), layers.KeyValueCache()
    taken, held = [], []
    with torch.no_grad():
        layer(torch.randn(1, 5, 32), cache=kept)
        for _ in range(60):
            layer(torch.randn(1, 1, 32), cache=kept)
            assert kept.keys is not None
            taken.append(kept.length)
            held.append(kept.keys.untyped_storage().nbytes() // (32 * 4))
    figure, (ax,) = grid(1, 1, 2.0)
    ax.step(taken, held, where="mid", color=ORANGE)
    ax.fill_between(taken, taken, color="#93c5fd", linewidth=0)
    ax.annotate("held", (41.5, 71), color=ORANGE)
    ax.annotate("taken", (52, 22), color=BLUE)
    plain(ax)
    ticks = (10, 20, 40, 60, 80)
    ax.set(
        xlabel="Tokens", ylabel="Size of the cache", xlim=(6, 65), ylim=(0, 90), xticks=(6, *ticks[:-1]), yticks=ticks
    )
    return figure


def latent() -> Figure:
    """Draw the number of cached elements per token, counted in the caches."""
    width, heads, x = 1024, 16, torch.randn(1, 1, 1024)
    kinds: dict[str, nn.Module] = {
        "MultiheadAttention": layers.MultiheadAttention(width, heads, batch_first=True),
        "MultiheadAttention, kv_heads=4": layers.MultiheadAttention(width, heads, batch_first=True, kv_heads=4),
        "LatentAttention, kv_rank=256": layers.LatentAttention(width, heads, 256, position=position.Rotary(32)),
        "MultiheadAttention, kv_heads=1": layers.MultiheadAttention(width, heads, batch_first=True, kv_heads=1),
    }
    counts = []
    for layer in kinds.values():
        kept = layers.KeyValueCache()
        layer(x, cache=kept)
        assert kept.keys is not None and kept.values is not None
        counts.append(kept.keys.numel() + kept.values.numel())
    figure, (ax,) = grid(1, 1, 1.6)
    shown = ax.barh(list(kinds), counts, 0.6, color=[ORANGE if "Latent" in name else BLUE for name in kinds])
    ax.bar_label(shown, [f"{count:,}" for count in counts], padding=4)
    ax.invert_yaxis()
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.set(xticks=[], xlim=(0, 2250), title="Cached elements per token")
    return figure


def outputs_of(model: nn.TransformerEncoder, x: Tensor) -> list[Tensor]:
    """Return the output of each layer of a stack."""
    found = []
    for layer in model.layers:
        x = layer(x)
        found.append(x.detach())
    return found


def replaced() -> Figure:
    """Draw the error of a stack relative to float64, layer by layer, before and after replacement."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    x = torch.randn(4, 50, 64)
    truth = outputs_of(model.double(), x.double())
    figure, (ax,) = grid(1, 1, 2.0)
    before = outputs_of(model.float(), x)
    after = outputs_of(layers.replace_attention(model), x)
    for found, name, look in (
        (before, "torch.nn", {"color": "#93c5fd", "linewidth": 4}),
        (after, "after replace_attention", {"color": ORANGE}),
    ):
        errors = [float((y - z).norm() / z.norm()) for y, z in zip(found, truth, strict=True)]
        ax.plot(range(1, 13), errors, label=name, **look)
    plain(ax)
    ax.legend(loc="lower right")
    ax.set(xlabel="Number of layers", ylabel="Error relative to float64", xticks=(1, 4, 8, 12), ylim=0)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Recurrent networks.


def additive() -> Figure:
    """Draw an alignment. Words are one-hot vectors of their meaning, and v gives matches a larger score."""
    source = ["the", "black", "cat", "drinks", "cold", "milk"]
    target = ["le", "chat", "noir", "boit", "du", "lait", "froid"]
    meaning = torch.eye(6)
    queries = torch.cat([meaning[[0, 2, 1, 3]], torch.zeros(1, 6), meaning[[5, 4]]])
    figure, axes = grid(1, 3, 2.7)
    for ax, component in zip(axes, (normalizer.Softmax(), normalizer.Entmax(1.5), normalizer.Sparsemax()), strict=True):
        layer = layers.AdditiveAttention(6, 6, 6, bias=False, normalizer=component)
        set_to(layer.query_map.weight, 2.0 * torch.eye(6))
        set_to(layer.key_map.weight, 2.0 * torch.eye(6))
        set_to(layer.v, -2.0)
        _, statistics = layer(queries[None], meaning[None], summary=Summary(full=True))
        heat(ax, statistics.full[0], type(component).__name__, most=1.0)
        named(ax, target if ax is axes[0] else (), source)
    return figure


def luong() -> Figure:
    """Draw the weights of global and of local attention, which are the outputs for values that are an identity matrix. Keys
    are random; a query is the key that it should find, and, in its first number, how far the decoder is.
    """
    S = 32
    progress = torch.linspace(-1, 1, S)
    p = S * torch.sigmoid(2.5 * torch.tanh(2 * progress))
    content = 2.3 * nn.functional.normalize(torch.randn(S, 15), dim=1)
    keys = torch.cat([torch.zeros(S, 1), content], 1)[None]
    queries = torch.cat([2 * progress[:, None], content[p.long()]], 1)[None]
    figure, axes = grid(1, 3, 2.55)
    titles = {None: "Global", "monotonic": 'local="monotonic"', "predictive": 'local="predictive"'}
    for ax, (local, title) in zip(axes, titles.items(), strict=True):
        layer = layers.LuongAttention(16, 16, "dot", local=local, reach=4)
        if layer.position_map is not None:
            set_to(layer.position_map.weight, torch.eye(16))
            set_to(layer.position_v, torch.tensor([2.5] + [0.0] * 15))
        heat(ax, layer(queries, keys, torch.eye(S)[None])[0], title)
        middle = {None: None, "monotonic": torch.arange(S), "predictive": p}[local]
        if middle is not None:
            ax.plot(middle.tolist(), range(S), color=ORANGE, linewidth=1)
        ax.set_xlabel("Source position")
    axes[0].set_ylabel("Step of the decoder")
    return figure


def influence(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient norms (L, S) of outputs (1, L, .) by inputs x (1, S, .), relative to the maximum of each row."""
    slopes: Tensor = torch.autograd.functional.jacobian(f, x)  # (1, L, ., 1, S, .)
    sizes = slopes[0, :, :, 0].square().sum((1, 3)).sqrt()
    return sizes / sizes.amax(-1, keepdim=True).clamp(min=1e-30)


def influences() -> Figure:
    """Draw how the memory of an encoder and the weights of a decoder depend on the inputs."""
    x, memory = torch.randn(1, 9, 2), 2 * torch.randn(1, 6, 2)
    figure, axes = grid(1, 4, 2.25)
    for ax, both in zip(axes, (False, True), strict=False):
        encoder = recurrent.RecurrentEncoder(2, 5, bidirectional=both)
        heat(ax, influence(lambda x, f=encoder: f(x)[0], x).sqrt(), f"Encoder\nbidirectional={both}")
        ax.set(xlabel="Input", ylabel="" if both else "Memory")
    for ax, order in zip(axes[2:], ("bahdanau", "luong"), strict=True):
        decoder = recurrent.RecurrentDecoder(2, 8, 2, order=order)
        look = partial(decoder, memory=memory, summary=Summary(full=True))
        heat(ax, influence(lambda x, f=look: f(x)[2].full, x).sqrt(), f'Decoder\norder="{order}"')
        ax.set(xlabel="Input", ylabel="" if order == "luong" else "Weights of a step")
    return figure


def coverage() -> Figure:
    """Draw the weights without and with coverage. Keys have different scores."""
    words = ["Germany", "beat", "Argentina", "in", "the", "final"]
    memory = torch.tensor([1.25, 0.75, 1.0, 0.25, 0.0, 0.5])[None, :, None]
    figure, axes = grid(1, 3, 2.5)
    losses, steps = [], []
    for on in (False, True):
        decoder = recurrent.RecurrentDecoder(2, 4, 1, layers.AdditiveAttention(4, 1, 4), coverage=on)
        set_to(decoder.attention.query_map.weight, 0.0)
        set_to(decoder.attention.query_map.bias, 0.0)
        set_to(decoder.attention.key_map.weight, 0.1)
        set_to(decoder.attention.v, 45.0)
        if on:
            set_to(decoder.coverage_map, -0.15)
        weights = decoder(torch.zeros(1, 6, 2), memory, summary=Summary(full=True))[2].full
        steps.append(weights[0])
        losses.append(float(recurrent.coverage_loss(weights.detach()).sum()))
    before = steps[1].cumsum(0)
    for ax, table, title in (
        (axes[0], steps[0], f"Weights, without\nloss {losses[0]:.1f}"),
        (axes[1], steps[1], f"Weights, with coverage\nloss {losses[1]:.1f}"),
        (axes[2], before, "Coverage: their sum\nafter each step"),
    ):
        heat(ax, table, title, most=1.0)
        ax.set_aspect("auto")
        named(ax, [str(step + 1) for step in range(6)] if ax is axes[0] else (), words)
    axes[0].set_ylabel("Step")
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Pooling.

GOOD, BAD = ("superb", "lovely", "moving"), ("dull", "awful", "clumsy")
SUBJECTS = (("film", "actor", "plot"), ("soup", "menu", "wine"))
FILLER = ["the", "was", "and", "with", "a", "we", "but", "very", "again", "it", "so"]
VOCABULARY = ["", *GOOD, *BAD, *SUBJECTS[0], *SUBJECTS[1], *FILLER]


class Review(nn.Module):
    """Classifier with one logit per query of a pooling layer: the product of its vector and a learned vector."""

    def __init__(self, pool: nn.Module, queries: int) -> None:
        super().__init__()
        self.words, self.pool = nn.Embedding(len(VOCABULARY), 16), pool
        self.weight = nn.Parameter(torch.randn(queries, 16) / 4)

    def forward(self, words: Tensor, summary: Summary | None = None) -> Any:
        n = (words > 0).sum(1)
        found = self.pool(self.words(words), mask.lengths(n), summary=summary)
        return found[1] if summary else (found.view(len(words), -1, 16) * self.weight).sum(-1)


def numbers(sentences: Sequence[str]) -> Tensor:
    """Return the word indices of sentences, padded with 0."""
    rows = [torch.tensor([VOCABULARY.index(word) for word in sentence.split()]) for sentence in sentences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def trained(pool: nn.Module, queries: int) -> Review:
    """Train on 256 synthetic reviews to predict whether they are positive, and, with two queries, about a film."""
    sentences, truth = [], torch.randint(2, (256, 2))
    for good, film in truth.tolist():
        count = int(torch.randint(4, 9, ()))
        words = [FILLER[i] for i in torch.randint(len(FILLER), (count,))]
        for chosen in ((BAD, GOOD)[good], SUBJECTS[1 - film]):
            words.insert(int(torch.randint(len(words) + 1, ())), chosen[int(torch.randint(3, ()))])
        sentences.append(" ".join(words))
    model, x = Review(pool, queries), numbers(sentences)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(80):
        optimizer.zero_grad()
        y = truth[:, :queries].float()
        nn.functional.binary_cross_entropy_with_logits(model(x), y).backward()
        optimizer.step()
    return model


def attention_pooling() -> Figure:
    """Draw the learned weights of two queries."""
    sentence = ["it", "was", "again", "a", "superb", "soup", "and", "the", "wine", "was", "very", "lovely"]
    statistics = trained(layers.AttentionPooling(16, queries=2), 2)(numbers([" ".join(sentence)]), Summary(full=True))
    figure, (ax,) = grid(1, 1, 1.35)
    heat(ax, statistics.full[0, 0])
    ax.set_aspect("auto")
    named(ax, ["Query 1: is it good?", "Query 2: of what?"])
    ax.set_xticks(range(len(sentence)), sentence)
    return figure


def additive_pooling() -> Figure:
    """Draw the weights of the words of two reviews, one of them padded, and those of a mean."""
    sentences = ["the film was very dull but again the actor was lovely", "a moving plot and it was superb"]
    statistics = trained(layers.AdditivePooling(16, 8), 1)(numbers(sentences), Summary(full=True))
    figure, axes = grid(2, 1, 2.4)
    for ax, sentence, weights in zip(axes, sentences, statistics.full[:, 0, 0], strict=True):
        words = sentence.split()
        ax.bar(range(len(weights)), weights.tolist(), 0.6, color=BLUE)
        ax.plot((-0.5, len(words) - 0.5), (1 / len(words),) * 2, color=ORANGE, linewidth=1)
        padding = ["(padding)"] * (len(weights) - len(words))
        ax.set_xticks(range(len(weights)), words + padding)
        plain(ax)
        ax.set(yticks=[], xlim=(-0.6, len(weights) - 0.4), ylim=(0, 1.0))
        for index, weight in enumerate(weights.tolist()):
            if weight > 0.01:
                ax.annotate(f"{weight:.2f}", (index, weight + 0.02), ha="center", fontsize=7)
    axes[0].annotate("a plain mean", (-0.5, 0.17), color=ORANGE, fontsize=7.5)
    return figure


def kernel() -> Figure:
    """Draw the regression of a noisy curve with several widths."""
    x = torch.rand(60, 1).sort(0).values * 10
    y = torch.sin(x) + x / 4 + 0.3 * torch.randn(60, 1)
    points = torch.linspace(0, 10, 300)[:, None]
    pool = layers.KernelPooling(2.0)
    optimizer = torch.optim.Adam(pool.parameters(), 0.1)
    for _ in range(120):
        optimizer.zero_grad()
        (pool(x, x, y, ~mask.window(0, 0)) - y).square().mean().backward()
        optimizer.step()
    figure, axes = grid(1, 3, 2.2, sharey=True)
    for ax, sigma in zip(axes, (0.05, float(pool.sigma.detach()), 2.0), strict=True):
        learned = ax is axes[1]
        ax.plot(x.flatten().tolist(), y.flatten().tolist(), ".", color=GREY, markersize=4)
        curve = layers.KernelPooling(sigma)(points, x, y)
        ax.plot(points.flatten().tolist(), curve.flatten().tolist(), color=ORANGE if learned else BLUE)
        plain(ax)
        ax.set_title(f"sigma = {sigma:.2f}{', learned' if learned else ''}")
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Vision.

RED, GREEN, SKY = (0.86, 0.15, 0.15), (0.09, 0.64, 0.29), (0.15, 0.39, 0.92)


def shapes() -> Tensor:
    """Return an image (1, 3, 24, 24) of two red shapes, a green and a blue one, on gray."""
    column = torch.arange(24) + 0.5
    row = column[:, None]
    x = torch.full((3, 24, 24), 0.85)
    for color, inside in (
        (RED, (row - 7).square() + (column - 7).square() < 18),
        (SKY, (row > 3) & (row < 10) & (column > 14) & (column < 21)),
        (GREEN, (row > 14) & (row < 21) & ((column - 7).abs() < (row - 13) / 2)),
        (RED, (row > 15) & (row < 20) & (column > 13) & (column < 21)),
    ):
        x[:, inside] = torch.tensor(color)[:, None]
    return x[None]


def color_channels(x: Tensor) -> Tensor:
    """Return maps (B, 3, H, W) of the red, green and blue in an image, 0 for gray."""
    return x - x.mean(1, keepdim=True)


def set_to_excess(mlp: nn.Sequential, gain: float, start: float) -> None:
    """Set the layers of a gate by hand: it grows with the excess of a channel over the mean of all, from `start` on."""
    first, _, last = mlp
    set_to(first.weight, torch.eye(3) - 1 / 3)
    set_to(last.weight, gain * torch.eye(3))
    set_to(first.bias, 0.0)
    set_to(last.bias, start)


def bars(ax: Axes, three: Tensor, title: str) -> None:
    """Draw one bar for each of red, green and blue."""
    shown = ax.bar(("red", "green", "blue"), three.tolist(), 0.6, color=(RED, GREEN, SKY))
    ax.bar_label(shown, [f"{number:.2f}" for number in three.tolist()], fontsize=7)
    ax.set(yticks=[], ylim=(0, 1.15), title=title)
    ax.set_box_aspect(1)
    plain(ax)


def squeeze() -> Figure:
    """Draw channel gates of a reddish and a bluish image."""
    layer = vision.SqueezeExcitation(3, 1)
    set_to_excess(layer.excite, 25.0, 0.0)
    figure, axes = grid(2, 4, 3.6)
    for row, tint in enumerate(((1.0, 0.8, 0.75), (0.75, 0.8, 1.0))):
        x = shapes() * torch.tensor(tint)[:, None, None]
        out, gates = layer(x, summary=True)
        ax = axes[4 * row :]
        picture(ax[0], x[0], "" if row else "Map (3 channels)")
        bars(ax[1], x[0].mean((1, 2)), "" if row else "Their means")
        bars(ax[2], gates.channels[0], "" if row else "Their gates")
        picture(ax[3], out[0], "" if row else "Map times gates")
    return figure


def cbam() -> Figure:
    """Draw channel gates and spatial gates."""
    x = shapes()
    layer = vision.CBAM(3, 1)
    set_to_excess(layer.mlp, 25.0, 0.4)
    kernel = torch.zeros(1, 2, 7, 7)
    kernel[0, :, 2:5, 2:5] = torch.tensor([-4.0, 4.0])[:, None, None] / 3
    set_to(layer.conv.weight, kernel)
    set_to(layer.conv.bias, -2.2)
    out, gates = layer(x, summary=True)
    figure, axes = grid(1, 4, 1.9)
    picture(axes[0], x[0], "Map (3 channels)")
    bars(axes[1], gates.channels[0], "Gates of channels")
    heat(axes[2], gates.places[0], "Spatial gates", most=1.0)
    picture(axes[3], out[0], "Map times gates")
    return figure


def non_local() -> Figure:
    """Draw the weights of three positions over all positions."""
    x = shapes()
    layer = vision.NonLocalBlock(3, 3)
    for conv in (layer.theta, layer.phi):
        set_to(conv.weight, 4.0 * torch.eye(3)[..., None, None])
        set_to(conv.bias, 0.0)
    chosen = {"a red position": (7, 7), "a green position": (18, 7), "a gray position": (12, 12)}
    _, statistics = layer(
        color_channels(x), summary=Summary(rows=[row * 24 + column for row, column in chosen.values()])
    )
    figure, axes = grid(1, 4, 1.9)
    picture(axes[0], x[0], "Map")
    for ax, weights, (name, cell) in zip(axes[1:], statistics.rows[0, 0], chosen.items(), strict=True):
        heat(ax, weights.view(24, 24), f"Weights of {name}", most=float(statistics.rows.detach().max()))
        outlined(ax, *cell)
        outlined(axes[0], *cell, edgecolor="black")
    return figure


def set_to_likeness(attention: nn.Module, gain: float) -> None:
    """Set the projections by hand: a token attends to similar tokens."""
    width = attention.qkv.in_features
    set_to(attention.qkv.weight, 0.0)
    set_to(attention.qkv.weight[: 2 * width], gain * torch.eye(width).repeat(2, 1))
    set_to(attention.qkv.bias, 0.0)


def near(size: int, width: float) -> vision.RelativeBias2d:
    """Return a bias of one head, set by hand, that makes the weights a Gaussian of this width."""
    bias = vision.RelativeBias2d(1, size)
    away = torch.arange(1 - size, size).float().square()
    set_to(bias.table, (-(away[:, None] + away) / (2 * width**2)).view(-1, 1))
    return bias


def patches() -> Figure:
    """Draw the weights of a patch by content, and by content and position."""
    x = shapes()
    figure, axes = grid(1, 4, 1.9)
    picture(axes[0], x[0], "Map, in patches of 3 x 3")
    for edge in range(3, 24, 3):
        axes[0].axhline(edge - 0.5, color="white", linewidth=0.6)
        axes[0].axvline(edge - 0.5, color="white", linewidth=0.6)
    for ax, embedding, title in zip(
        axes[1:],
        (nn.Identity(), near(8, 2.0), vision.Rotary2d(24)),
        ("nn.Identity()", "RelativeBias2d", "Rotary2d"),
        strict=True,
    ):
        layer = vision.PatchAttention(3, 1, patch=3, width=27, position=embedding)
        set_to_likeness(layer.attention, 0.75)
        _, statistics = layer(color_channels(x), summary=Summary(rows=5 * 8 + 5))
        heat(ax, statistics.rows[0, 0, 0].view(8, 8), title)
        outlined(ax, 5, 5)
    outlined(axes[0], 15, 15, 3, 3, edgecolor="black")
    return figure


def positions() -> Figure:
    """Draw the weights of a position of a map without content, which depend on positions only."""
    side, width = 13, 32
    kinds = {
        "Sinusoidal2d": (vision.Sinusoidal2d(), 0.0),
        "Learned2d, untrained": (vision.Learned2d(width, side), 0.0),
        "Rotary2d": (vision.Rotary2d(width), 1.0),
        "RelativeBias2d": (near(side, 2.0), 0.0),
    }
    figure, axes = grid(1, 4, 1.9)
    for ax, (name, (embedding, constant)) in zip(axes, kinds.items(), strict=True):
        layer = vision.PatchAttention(width, 1, position=embedding)
        set_to_likeness(layer.attention, 0.9)
        set_to(layer.attention.qkv.bias, constant)
        _, statistics = layer(torch.zeros(1, width, side, side), summary=Summary(rows=4 * side + 5))
        heat(ax, statistics.rows[0, 0, 0].view(side, side), name)
        outlined(ax, 4, 5)
    return figure


def windows() -> Figure:
    """Return the number of positions that each position attends to, and the borders that no position attends across."""
    figure, axes = grid(1, 3, 2.6, width_ratios=(12, 12, 10))
    for ax, shift, (H, W) in zip(axes, (0, 2, 2), ((12, 12), (12, 12), (12, 10)), strict=True):
        layer = vision.WindowAttention2d(4, 1, window=4, shift=shift)
        set_to(layer.attention.out.weight, torch.eye(4))
        slopes = torch.autograd.functional.jacobian(lambda x, f=layer: f(x).sum(1), torch.randn(1, 4, H, W))
        attends = slopes[0, :, :, 0].abs().sum(2) > 1e-12  # (H, W, H, W): whether one position attends to another
        heat(ax, attends.sum((2, 3)).double(), f"shift={shift}, map {H} x {W}", most=32.0)
        x, y = [], []  # one line, with gaps
        for row in range(H):
            for column in range(W):
                if column + 1 < W and not attends[row, column, row, column + 1]:
                    x += [column + 0.5, column + 0.5, math.nan]
                    y += [row - 0.5, row + 0.5, math.nan]
                if row + 1 < H and not attends[row, column, row + 1, column]:
                    x += [column - 0.5, column + 0.5, math.nan]
                    y += [row + 0.5, row + 0.5, math.nan]
        ax.plot(x, y, color="white", linewidth=2)
        inside = attends[5, 5].nonzero()
        (top, left), (bottom, right) = inside.amin(0).tolist(), inside.amax(0).tolist()
        outlined(ax, top, left, bottom - top + 1, right - left + 1)
        ax.plot(5, 5, "o", color=ORANGE, markersize=3)
    return figure


def pool2d() -> Figure:
    """Draw one query with three heads, each of which attends to one color."""
    x = shapes()
    layer = vision.AttentionPool2d(3, 3, mean=False, position=nn.Identity())
    set_to(layer.query, 1.0)
    for linear, gain in ((layer.q, 1.0), (layer.k, 9.0)):
        set_to(linear.weight, gain * torch.eye(3))
        set_to(linear.bias, 0.0)
    _, statistics = layer(color_channels(x), summary=Summary(full=True))
    figure, axes = grid(1, 4, 1.9)
    picture(axes[0], x[0], "Map")
    for head, ax in enumerate(axes[1:]):
        heat(ax, statistics.full[0, head, 0].view(24, 24), f"Weights of head {head + 1}")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "multihead": multihead, "block": block, "cache": cache, "latent": latent, "replace": replaced, "additive": additive,
    "luong": luong, "recurrent": influences, "coverage": coverage, "attention_pooling": attention_pooling,
    "additive_pooling": additive_pooling, "kernel_pooling": kernel, "squeeze_excitation": squeeze, "cbam": cbam,
    "non_local": non_local, "patch": patches, "position": positions, "window": windows, "pool2d": pool2d,
}  # fmt: skip


def draw() -> None:
    """Write all pictures."""
    with matplotlib.rc_context(STYLE), torch.random.fork_rng():
        for name, make in PICTURES.items():
            torch.manual_seed(0)
            written = StringIO()
            make().savefig(written, format="svg", metadata={"Date": None, "Creator": None})
            # Remove invisible elements.
            text = re.sub(r'<!--.*?-->|(?<=<g) id="[^"]*"|(?<=\n) +| +(?=\n)', "", written.getvalue())
            (Path(__file__).parent / "layers" / f"{name}.svg").write_text(re.sub(r"<g/>\n|(?<=\n)\n", "", text))


if __name__ == "__main__":
    draw()
