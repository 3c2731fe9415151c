"""The report's plots, as PNG. They are narrow enough for a phone."""

import io

from matplotlib.figure import Figure
from torch import Tensor

WIDEST_WITH_NUMBERS = 12  # a map of more columns has no space for its numbers
WIDTH, HEIGHT = 4.5, 3.5  # inches, of one panel


def plot_heat_maps(maps: dict[str, Tensor]) -> bytes:
    """Nats per code by position: maps (h, w) one below the other under their titles. All share one scale from 0."""
    figure = Figure(figsize=(WIDTH, HEIGHT * len(maps)), layout="constrained")
    panels = figure.subplots(len(maps), squeeze=False)[:, 0]
    most = max(1e-9, *(float(nats.max()) for nats in maps.values()))
    for panel, (title, nats) in zip(panels, maps.items(), strict=True):
        image = panel.imshow(nats.numpy(), vmin=0, vmax=most, cmap="viridis")
        panel.locator_params(integer=True)
        panel.set_title(f"{title}: {nats.mean():.2f}")
        for i, row in enumerate(nats.tolist()):
            for j, value in enumerate(row if nats.shape[1] <= WIDEST_WITH_NUMBERS else []):
                color = "white" if value < most / 2 else "black"
                panel.text(j, i, f"{value:.1f}", ha="center", va="center", color=color)
    figure.colorbar(image, ax=panels, label="nats per code")
    return _to_png(figure)


def plot_code_usage(counts: Tensor) -> bytes:
    """The share of each code, the most frequent first. `counts` is (K,) int64, of a sum above 0."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    panel = figure.subplots()
    ordered = counts.sort(descending=True).values
    panel.plot((ordered / ordered.sum()).numpy(), label="share of all codes")
    panel.axhline(1 / len(ordered), color="gray", linestyle="--", label="an even split")
    panel.set(xlabel="code, by rank", ylabel="share", yscale="log", xlim=(0, len(ordered) - 1))
    panel.legend()
    return _to_png(figure)


def _to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
