"""One picture of an inspection: outliers before and after rotation, error by layer, size by part."""

from __future__ import annotations

import io
from typing import Any

from quamba.errors import UserError
from quamba.inspection.activations import Spread
from quamba.inspection.model import EMBEDDING, REST, Inspection, Rotation

BEFORE, AFTER, INK, GREY = "#c2410c", "#1d4ed8", "#1f2933", "#6b7782"
BAR, PAD, THIN = 0.84, 0.1, 0.055
"""Of the bars: width, space at the sides, and the share of the tallest below which a part has no room for its name."""
ROLES = ("#0f766e", "#b7791f", "#7c3aed", "#be185d", "#4d7c0f", "#0369a1", "#475569", "#92400e")
"""Of linear roles in the order of the model; a ninth begins again."""
OTHERS = {EMBEDDING: "#94a3b8", "lm_head": "#cbd5e1", REST: "#e7e0d5"}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.labelsize": 10, "axes.edgecolor": GREY, "axes.labelcolor": INK,
    "axes.titlecolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e5e9ed",
    "grid.linewidth": 0.8, "legend.frameon": False, "legend.fontsize": 9, "figure.facecolor": "white",
}  # fmt: skip


def require() -> None:
    """Raises UserError where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401 (whether it is there)
    except ImportError:
        raise UserError("plots need matplotlib; install it with: pip install quamba[plot]") from None


def draw(found: Inspection, layer: int | None = None) -> bytes:
    """The picture as PNG, 100 dpi.

    layer: whose activations are shown; None takes the layer whose input of a rotated linear (or whose stream, where
    there is none) has the largest outlier ratio before rotation. Raises UserError for a layer that does not exist, for
    an inspection that ran no text, and where matplotlib is missing.
    """
    require()
    import matplotlib
    from matplotlib.figure import Figure

    if not found.rotations:
        raise UserError("a plot shows activations, and none were measured; give at least one of --samples")
    chosen = pick(found, layer)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure: Any = Figure(figsize=(15, 4.9), dpi=100, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.03)
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1.15, 0.9))
        _outliers(left, chosen)
        _by_layer(middle, found)
        _sizes(right, found)
        figure.suptitle(_headline(found), x=0.012, ha="left", fontsize=12.5)
        target = io.BytesIO()
        figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def pick(found: Inspection, layer: int | None) -> list[Rotation]:
    """The activations of one layer that are shown: the rotated inputs of linears first, then the stream."""
    layers = sorted({r.layer for r in found.rotations})
    if layer is None:
        rotated = [r for r in found.rotations if r.role != "residual"] or found.rotations
        layer = max(rotated, key=lambda r: r.before.outlier_ratio).layer
    if layer not in layers:
        raise UserError(f"--layer {layer} is none of the {len(layers)} layers 0 to {layers[-1]}")
    return sorted((r for r in found.rotations if r.layer == layer), key=lambda r: r.role == "residual")


def _headline(found: Inspection) -> str:
    kind = f"{found.recipe}, {found.bits:.2f} bits per weight" if found.quantised else "not quantised"
    return f"{found.model.rstrip('/').rpartition('/')[2]}   {found.model_type}, {kind}, {found.bytes / 1e6:,.1f} MB"


def _outliers(axes: Any, chosen: list[Rotation]) -> None:
    """Sorted channel peaks in units of the rms, which a rotation leaves alone."""
    styles = ["-", (0, (1.2, 1.2)), (0, (4, 1.5)), "-."]
    for rotated, style in zip(chosen, styles, strict=False):
        name = "residual stream" if rotated.role == "residual" else f"input of {rotated.role}"
        for spread, colour, when in ((rotated.before, BEFORE, "before"), (rotated.after, AFTER, "after")):
            peaks = _sorted(spread)
            axes.plot(
                [100 * (i + 1) / len(peaks) for i in range(len(peaks))], peaks, color=colour, linestyle=style,
                linewidth=1.9, label=f"{name}, {when} (max/rms {spread.outlier_ratio:.1f})",
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("channels, largest first (%)")
    axes.set_ylabel("peak of a channel: max |x| / rms of the tensor")
    axes.set_ylim(top=axes.get_ylim()[1] * 3)
    axes.set_title(f"Outliers of layer {chosen[0].layer}, before and after rotation")
    _plain(axes.xaxis)
    _plain(axes.yaxis)
    axes.grid(which="minor", visible=False)
    axes.legend(loc="upper right")


def _sorted(spread: Spread) -> list[float]:
    peaks: list[float] = (spread.channel_peaks / max(spread.rms, 1e-30)).sort(descending=True).values.tolist()
    return peaks


def _by_layer(axes: Any, found: Inspection) -> None:
    """Weight error of every role by layer; what rounding alone costs without an original; outliers of floats."""
    if found.original is not None:
        title, unit, value = "Weight error by layer", "‖stored − exact‖ / ‖exact‖ (%)", _error
    elif found.quantised:
        title, unit, value = "Rounding noise of the grid by layer", "rms of step / √12, over rms of weights (%)", _noise
    else:
        title, unit, value = "Outliers of what linears read, by layer", "max |x| / rms", _ratio
    for role, colour in _colours(found).items():
        rows = [row for row in found.rows if row.role == role and row.layer is not None and value(row) is not None]
        if rows:
            x, y = [row.layer for row in rows], [value(row) for row in rows]
            axes.plot(x, y, color=colour, label=role, linewidth=1.6, marker="o", markersize=4)
    axes.set_title(title)
    axes.set_xlabel("layer")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.18)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="upper right", ncols=4, columnspacing=1.2, handlelength=1.4)


def _error(row: Any) -> float | None:
    return None if row.weight_error is None else 100 * row.weight_error


def _noise(row: Any) -> float | None:
    return None if row.rounding is None else 100 * row.rounding


def _ratio(row: Any) -> float | None:
    return None if row.input is None else row.input.outlier_ratio


def _sizes(axes: Any, found: Inspection) -> None:
    """Bytes by part as stored, beside the same parameters at 16 bits each."""
    colours = {**_colours(found), **OTHERS}
    stored = found.sizes
    counts = dict.fromkeys(stored, 0)
    for row in found.rows:
        counts[row.role] += 2 * row.parameters if row.parameters else row.bytes
    bars = {"the same at 16 bits": counts, "stored": stored} if found.quantised else {"stored": stored}
    order = sorted(stored, key=lambda role: (role in OTHERS, list(OTHERS).index(role) if role in OTHERS else 0))
    top = max(sum(parts.values()) for parts in bars.values()) / 1e6
    digits, lines = 1 if top >= 10 else 2, 0
    for x, parts in enumerate(bars.values()):
        base, small = 0.0, []
        for role in order:
            size = parts[role] / 1e6
            axes.bar(x, size, bottom=base, width=BAR, color=colours[role], edgecolor="white", linewidth=0.8)
            if size > THIN * top:
                axes.text(x, base + size / 2, f"{role} {size:,.{digits}f}", ha="center", va="center", fontsize=9,
                          color="white" if role not in OTHERS else INK)  # fmt: skip
            elif size:
                small.append(f"{role} {size:,.{digits}f}")
            base += size
        lines = max(lines, len(small))
        _total(axes, x, base, f"{base:,.{digits}f} MB", small)
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_xlim(-0.5 - PAD, len(bars) - 0.5 + PAD)
    axes.set_ylim(0, (1.1 + 0.04 * lines) * top)
    axes.set_ylabel("MB (10⁶ bytes)")
    axes.set_title("Size by part")
    axes.grid(axis="x", visible=False)


def _total(axes: Any, x: int, top: float, total: str, small: list[str]) -> None:
    """Above a bar its total, and between them the parts that were too thin for a name."""
    options = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
    thin = axes.annotate("\n".join(small), (x, top), (0, 3), fontsize=8, color=GREY, **options)
    axes.annotate(total, (0.5, 1), (0, 2), xycoords=thin, fontweight="bold", **options)


def _colours(found: Inspection) -> dict[str, str]:
    roles = [role for role in found.sizes if role not in OTHERS]
    return {role: ROLES[i % len(ROLES)] for i, role in enumerate(roles)}


def _plain(axis: Any) -> None:
    """1, 2, 5, 10 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
