"""The demo's pictures. Colours of Okabe and Ito, which colour-blind readers can tell apart; sized for a README."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from rnn_ext._files import replacing
from rnn_ext.training import Forecasting, Training

COLOURS = {"native": "#0072B2", "custom": "#D55E00"}
NAMES = {"native": "torch.nn", "custom": "rnn_ext"}
INK, GREY = "#222222", "#8C8C8C"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
}


def save(figure: Figure, path: Path) -> None:
    """The picture, whole or not at all."""
    with replacing(path) as file:
        figure.savefig(file, format="png")


def forecast(path: Path, run: Training) -> None:
    """The last part of the series, which was not trained on: the truth, the forecasts, and what they are wrong by."""
    task = run.task
    assert isinstance(task, Forecasting)
    truth = task.unscale(task.test.target).numpy()
    predicted = task.unscale(run.predict().cpu()).numpy()
    last = task.unscale(task.test.inputs[0][:, -1]).numpy()
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4.6))
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
        top.plot(task.index, truth, color=INK, linewidth=1.6, label="measured")
        top.plot(
            task.index,
            predicted,
            color=COLOURS[run.config.backend],
            linewidth=1.6,
            linestyle=(0, (4, 1.5)),
            label=f"forecast one month ahead, RMSE {run.evaluate():.2f} °C",
        )
        top.set_ylabel("temperature (°C)")
        top.set_title("Sea surface temperature off Peru, months the model was not trained on")
        low, high = top.get_ylim()
        top.set_ylim(low, high + 0.22 * (high - low))  # room for the legend
        top.legend(loc="upper left", ncols=2)
        bottom.axhline(0, color=INK, linewidth=0.8)
        bottom.fill_between(task.index, last - truth, color=GREY, alpha=0.35, linewidth=0, label="“same as last month”")
        bottom.plot(task.index, predicted - truth, color=COLOURS[run.config.backend], linewidth=1.4, label="the model")
        bottom.set_ylabel("error (°C)")
        bottom.set_xlabel("year")
        most = np.abs(bottom.get_ylim()).max()
        bottom.set_ylim(-most, 1.9 * most)
        unit = 10.0 ** np.floor(np.log10(most))
        bottom.set_yticks(np.array([-1, 0, 1]) * np.floor(most / unit) * unit)
        bottom.legend(loc="upper left", ncols=2)
        bottom.margins(x=0.01)
        save(figure, path)


def losses(path: Path, races: dict[str, dict[str, Training]]) -> None:
    """The losses of both backends, one upon the other, and how far apart they are."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4.4))
        axes = figure.subplots(2, len(races), sharex="col", squeeze=False, height_ratios=[2, 1])
        for (title, runs), (top, bottom) in zip(races.items(), axes.T, strict=True):
            style = {"native": {"linewidth": 5.0, "alpha": 0.45}, "custom": {"linewidth": 1.4}}
            first = next(iter(runs.values()))
            ends = np.unique(np.linspace(0, len(first.losses), 101).astype(int))[1:]  # of what each point summarises
            epochs = ends / first.steps
            for backend, run in runs.items():
                means = [part.mean() for part in np.split(np.array(run.losses), ends[:-1])]
                top.plot(epochs, means, color=COLOURS[backend], label=NAMES[backend], **style[backend])
            top.set_title(title)
            top.set_yscale("log")
            top.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            top.yaxis.set_major_formatter("{x:g}")
            top.yaxis.set_minor_locator(NullLocator())
            top.legend()
            bottom.set_xlabel("epoch")
            if len(runs) == 2:
                apart = np.abs(np.subtract(*(run.losses for run in runs.values())))
                apart = np.maximum.reduceat(apart, np.concatenate([[0], ends[:-1]]))
                # Epochs without any difference have no place on this scale; those between two of them are a dot.
                bottom.plot(epochs, np.where(apart > 0, apart, np.nan), "o-", color=INK, linewidth=1.2, markersize=2.5)
                bottom.set_yscale("log")
                if apart.any():
                    whole = np.log10([apart[apart > 0].min(), apart.max()])
                    bottom.set_ylim(10.0 ** np.floor(whole[0]), 10.0 ** np.ceil(whole[1]))
                bottom.yaxis.set_minor_locator(NullLocator())
        axes[0, 0].set_ylabel("training loss")
        axes[1, 0].set_ylabel("largest difference\nof the two")
        save(figure, path)


def epoch_time(path: Path, races: dict[str, dict[str, Training]], where: str) -> None:
    """How long an epoch takes there: bars are medians, dots the epochs."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 0.7 + 1.5 * len(races)))
        axes = figure.subplots(len(races), 1, squeeze=False)[:, 0]
        scatter = np.random.default_rng(0)
        for axis, (title, runs) in zip(axes, races.items(), strict=True):
            times = {backend: np.array(run.seconds) for backend, run in runs.items()}
            medians = {backend: float(np.median(seconds)) for backend, seconds in times.items()}
            slowest = max(medians.values())
            scale, unit = (1e3, "ms") if slowest < 1 else (1, "s")
            # epochs that the rest of the machine held up would squeeze the others: of many, the slowest are left out
            many = max(map(len, times.values())) >= 20
            limit = max(np.quantile(seconds, 0.97 if many else 1) for seconds in times.values())
            labels = []
            for place, (backend, seconds) in enumerate(times.items()):
                axis.barh(place, medians[backend] * scale, height=0.66, color=COLOURS[backend], alpha=0.8)
                jitter = place + scatter.uniform(-0.2, 0.2, len(seconds))
                axis.plot(seconds * scale, jitter, "o", color=INK, markersize=3, alpha=0.4, markeredgewidth=0)
                labels.append(f"{NAMES[backend]}: {medians[backend] * scale:.3g} {unit}")
            if len(runs) == 2:
                labels[1] += f"\n{medians['native'] / medians['custom']:.1f}x the speed"
            axis.set_yticks(range(len(runs)), labels)
            axis.invert_yaxis()
            axis.grid(axis="y", visible=False)
            axis.set_xlim(0, 1.05 * limit * scale)
            axis.set_title(title)
            left_out = ", the slowest 3 % left out" * many
            axis.set_xlabel(f"{unit} per epoch (bar: median, dots: epochs{left_out})")
        figure.supxlabel(where, fontsize=8, color=INK)
        save(figure, path)
