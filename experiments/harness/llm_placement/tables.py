"""Compare the arms of a placement with the plain one, in tables and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from flatjax.run.records import Record, number
from flatjax.run.tables import aligned
from harness.llm_placement.trials import BITS
from harness.results.intervals import Interval, effect, interval, is_clear
from harness.results.style import plt, tidy

_KAPPAS = {"kappa_of_head": "κ of head", "kappa_of_blocks": "κ of blocks"}


def quantities(noises: Sequence[float]) -> dict[str, str]:
    """Return what is compared, where lower is better, with its name."""
    return (
        {"held_out": "held out", "transfer": "transfer"}
        | {f"noise_{size:g}": f"noise {size:g}" for size in noises}
        | {f"int{bits}": f"int{bits}" for bits in BITS}
    )


def row_of(
    names: Mapping[str, str],
    own: Sequence[Record],
    plain: Sequence[Record] | None,
    tried: Sequence[Record],
    timing: Record,
) -> Record:
    """Return means with intervals, differences from plain by seed, the strengths tried, and the time of a step."""
    measured = [*names, *_KAPPAS]
    strengths = [each["strength"] for each in tried]
    return {
        "strength": own[0]["strength"],
        "edge": edge(own[0]["strength"], strengths),
        "means": {name: interval(_values(own, name)) for name in measured},
        "less_plain": plain
        and {name: effect(_values(own, name), _values(plain, name)).difference for name in measured},
        "tried": [{name: each[name] for name in ("strength", *measured)} for each in tried],
        "seconds": timing["seconds"],
        "ratio": timing["ratio"],
    }


def _values(records: Sequence[Record], name: str) -> list[float]:
    return [number(record[name]) for record in records]


def edge(value: float, tried: Sequence[float]) -> str:
    """Return an arrow towards what was not tried, if the best is the first or last of what was."""
    return "" if len(tried) < 2 else {min(tried): " ↓", max(tried): " ↑"}.get(value, "")


def table(names: Mapping[str, str], rows: Mapping[str, Record], seeds: int, steps: int) -> str:
    """Format means, differences, and the strengths tried as a table."""
    heads = [*names.values(), *_KAPPAS.values()]
    means = [["", "λ or ρ", *heads, "ms a step"]]
    differences = [["less plain, seed by seed", *names.values()]]
    tried = [["tried with one other seed", "λ or ρ", *heads]]
    for title, row in rows.items():
        is_plain = row["less_plain"] is None
        cells = [_plus_minus(row["means"][name]) for name in names]
        kappas = [f"{row['means'][name].mean:.3g}" for name in _KAPPAS]
        strength = "" if is_plain else f"{row['strength']:g}{row['edge']}"
        means.append([title, strength, *cells, *kappas, f"{1e3 * row['seconds']:.1f} ({row['ratio']:.2f}×)"])
        if not is_plain:
            differences.append([title, *(_plus_minus(row["less_plain"][name], "+") for name in names)])
        for each in row["tried"]:
            values = [f"{number(each[name]):.4f}" for name in names]
            kappas = [f"{number(each[name]):.3g}" for name in _KAPPAS]
            tried.append([title, "" if is_plain else f"{each['strength']:g}", *values, *kappas])
    gains = [row["less_plain"][name] for row in rows.values() if row["less_plain"] for name in names]
    return (
        f"{aligned(means)}\n\n{aligned(differences)}\n\n{aligned(tried)}\n\n"
        "Loss in nats a token (lower is better), on files and on modules held out; then by how much that "
        "on files rises. Larger κ is sharper. ± is a 95 % "
        f"interval over {seeds} seeds.\n*: the interval leaves out 0: {sum(map(is_clear, gains))} of {len(gains)} do; "
        f"if no arm did anything, {0.05 * len(gains):.1f} would.\n"
        "↓ and ↑: the lowest and the highest strength tried was the best, by the loss on held-out files. All arms have "
        f"{steps} steps;\na step is of one network on one device."
    )


def _plus_minus(values: Interval, sign: str = "") -> str:
    mark = ("*" if is_clear(values) else " ") if sign else ""
    return f"{values.mean:{sign}.4f} ± {values.half_width:.4f}{mark}"


def draw(path: Path, names: Mapping[str, str], rows: Mapping[str, Record], seeds: int) -> None:
    """Draw a panel per quantity: the difference from plain with its interval, by arm."""
    arms = [arm for arm in rows if rows[arm]["less_plain"]]
    if not arms:
        return
    with plt.rc_context({"font.size": 9}):
        figure, all_axes = plt.subplots(
            2, -(-len(names) // 2), squeeze=False, figsize=(9, 0.5 * len(arms) + 2.6), layout="constrained", dpi=200,
            sharey=True,
        )  # fmt: skip
        for axes in all_axes.ravel()[len(names) :]:
            axes.set_visible(False)
        for axes, (name, label) in zip(all_axes.ravel(), names.items(), strict=False):
            axes.axvline(0, color="0.25", linewidth=0.8, linestyle=(0, (4, 3)))
            axes.locator_params(axis="x", nbins=4)
            for place, arm in enumerate(arms):
                mean, reach = rows[arm]["less_plain"][name]
                colour = "#d1600f" if is_clear(Interval(mean, reach)) else "#0b4f8a"
                axes.errorbar(mean, place, xerr=reach, fmt="o", color=colour, markersize=4, linewidth=1.3, capsize=2.5)
            axes.set_title(label, fontsize=9)
            axes.set_yticks(range(len(arms)), arms)
            tidy(axes, grid="x")
            axes.margins(y=0.2)
        all_axes[0, 0].invert_yaxis()
        figure.suptitle(
            f"Loss less that of plain training, nats a token (lower is better), {seeds} seeds\n"
            "(orange: the interval leaves out 0)",
            fontsize=10,
        )
        figure.savefig(path)
    plt.close(figure)
