"""
Generate the learning curves, tables and headline of the README and docs/ from the results of `benchmarks.learning`, and run
:mod:`benchmarks.where_figures`.

    python -m benchmarks.figures

Scores are interquartile means (IQM) over runs, with 95% percentile bootstrap intervals (Agarwal et al., 2021, "Deep
reinforcement learning at the edge of the statistical precipice"). For a single environment, their stratified bootstrap is the
ordinary bootstrap.
"""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from benchmarks import where_figures
from benchmarks.common import ADVANTAGES, IMAGES, PAGE, README, RESULTS, STEP, fill, read_folder
from benchmarks.learning import FOLDER
from sb3_reinforce.returns import AdvantageName
from sb3_reinforce.tools.report.estimates import count, interval, iqm

LANDER = "LunarLanderContinuous-v3"
SOLVED = 200.0
#: Color of each algorithm in the learning curves
COLORS = {
    "defaults": "tab:blue",
    "reinforce": "tab:cyan",
    "reinforce-300k": "tab:cyan",
    "trpo": "tab:red",
    "a2c": "tab:brown",
    "final-trpo": "tab:red",
    "final-ppo": "tab:orange",
    "race-defaults": "tab:blue",
    "race-reinforce": "tab:cyan",
    "race-workers": "tab:purple",
    "race-envpool": "tab:green",
    "race-trpo": "tab:red",
    "race-ppo": "tab:orange",
    "race-a2c": "tab:brown",
    "race-tianshou": "tab:gray",
}
#: On the lander, runs that took turns, until 200. All others have no comparable timings
IN_TURN = ("race-defaults", "race-reinforce", "race-workers", "race-envpool", "race-trpo", "race-ppo")


class Group(NamedTuple):
    """Runs of variants on the same tasks: folders of ``prefix`` and variant, and the page with their table and figure."""

    prefix: str
    colors: dict[str, str]
    page: Path
    block: str
    column: str


GROUPS = (
    Group(
        "advantage-",
        dict(zip(get_args(AdvantageName), ("tab:blue", "tab:red", "tab:green", "tab:orange"), strict=True)),
        ADVANTAGES,
        "advantages",
        "`advantage`",
    ),
    Group(
        "step-",
        {
            "chosen": "tab:blue",
            "plain": "tab:gray",
            "damping-1": "tab:orange",
            "damping-0.1": "tab:red",
            "damping-0.3": "tab:pink",
            "bootstrap": "tab:brown",
            "no-time": "tab:green",
            "no-time-bootstrap": "tab:olive",
        },
        STEP,
        "step-table",
        "step",
    ),
)
PREFIXES = tuple(group.prefix for group in GROUPS)

#: Published returns on older versions of the MuJoCo tasks: Tianshou's REINFORCE after 10 M steps, Spinning Up's VPG after 3 M
#: and RL Zoo's TRPO after 1 M; None if there is no published return
MUJOCO: dict[str, tuple[float, float | None, float | None]] = {
    "Ant": (1108, 5, 4982),
    "HalfCheetah": (1139, 600, 1785),
    "Hopper": (416, 800, 3618),
    "Walker2d": (441, 460, 4933),
    "Swimmer": (36, 51, 366),
    "Humanoid": (464, None, None),
    "Reacher": (-5.5, None, None),
    "InvertedPendulum": (1000, None, None),
    "InvertedDoublePendulum": (7726, None, None),
}
#: Tasks with runs of other algorithms, and the folder of REINFORCE's runs
BESIDE = {"HalfCheetah": "reinforce", "Hopper": "defaults", "Swimmer": "reinforce"}
#: Rows of the table of peers, by name in the race: label, and folder with the final returns
PEERS = {
    "defaults": ("REINFORCE, defaults", "defaults"),
    "reinforce": ("REINFORCE, `reinforce.yml`", "reinforce-300k"),
    "workers": ("the same, `workers=2`, two cores", "final-workers"),
    "envpool": ("the same, 16 EnvPool environments", "final-envpool"),
    "trpo": ("TRPO", "final-trpo"),
    "ppo": ("PPO", "final-ppo"),
    "a2c": ("A2C", "race-a2c"),
    "tianshou": ("Tianshou's Reinforce", "race-tianshou"),
}


#: Settings of ``step_search.csv`` that are compared to the defaults
TRIED: tuple[dict[str, Any], ...] = (
    dict(max_episode_steps=400),
    dict(max_episode_steps=500),
    dict(n_episodes="5 + n / 20"),
    dict(max_episode_steps=500, n_episodes="5 + n / 20"),
    dict(bootstrap_timeouts=True),
    # Conjugate gradients end at this residual, relative to the gradient, and have up to 15 products, as in the defaults
    dict(residual="0.03 at a third of the damping"),
    dict(cg_damping="drawn at random"),
    # States that the Fisher matrix takes from a batch of 500
    dict(fisher_states=70),
    dict(fisher_states=256),
)


def read(env_id: str, name: str) -> list[dict[str, Any]]:
    """Read the runs of an environment and algorithm, sorted by seed."""
    return read_folder(FOLDER / env_id / name)


def reached_at(run: dict[str, Any], what: str, threshold: float = SOLVED) -> float:
    """Return the steps or seconds until an evaluation first reaches a threshold, or infinity."""
    return min((point[what] for point in run["evaluations"] if point["mean_return"] >= threshold), default=np.inf)


def finals(env_id: str, name: str) -> np.ndarray:
    """Return the mean final return of each finished run."""
    return np.array([np.mean(run["final_returns"]) for run in read(env_id, name) if run["final_returns"]])


def score(returns: np.ndarray, digits: int = 0, bold: str = "") -> str:
    """Format the IQM and its interval (none for a single seed)."""
    span = "" if len(returns) < 2 else " [{:.{d}f}, {:.{d}f}]".format(*interval(returns, iqm), d=digits)
    return f"{bold}{iqm(returns):.{digits}f}{bold}{span}"


def cells(returns: np.ndarray) -> str:
    """Format the columns of final returns: IQM, worst and best seed."""
    return f"{score(returns, digits=1)} | {returns.min():.1f}, {returns.max():.1f}"


class Race(NamedTuple):
    """Medians over runs until an evaluation first reaches 200. A run that never reaches it counts as infinite."""

    seconds: float
    steps: float
    n_passed: int
    n_runs: int

    @property
    def passed(self) -> str:
        return f"{self.n_passed} of {self.n_runs}"


def race(name: str) -> Race | None:
    """Summarize the runs of an algorithm in the race, in turn with others on one core; None if there are none."""
    if not (runs := read(LANDER, f"race-{name}")):
        return None
    seconds, steps = (np.array([reached_at(run, what) for run in runs]) for what in ("seconds", "steps"))
    return Race(float(np.median(seconds)), float(np.median(steps)), int(np.isfinite(steps).sum()), len(runs))


def measured(value: float, form: str) -> str:
    """Format a median of a race, which can be infinite."""
    return format(value, form) if np.isfinite(value) else "never"


def markdown(columns: list[str], rows: list[tuple[Any, ...]]) -> str:
    """Format a Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (columns, ["---"] * len(columns), *rows))


def table() -> str:
    """Create a table with one row per environment and algorithm with finished runs."""
    rows: list[tuple[Any, ...]] = []
    for folder in sorted(FOLDER.glob("*/*")):
        runs = [run for run in read(folder.parent.name, folder.name) if run["final_returns"]]
        # Races end at the first pass. Groups have pages of their own
        if not runs or folder.name.startswith(("race-", *PREFIXES)):
            continue
        steps = np.median([run["timesteps"] for run in runs])
        seconds = np.median([run["seconds"] for run in runs])
        returns = cells(finals(folder.parent.name, folder.name))
        rows.append((folder.parent.name, folder.name, len(runs), f"{steps / 1e6:.2g} M", returns, f"{seconds:.0f}"))
    return markdown(
        [
            "environment",
            "algorithm",
            "seeds",
            "steps",
            "return: IQM [95% interval]",
            "worst and best seed",
            "seconds per run",
        ],
        rows,
    )


def options(command: str) -> str:
    """Return the sorted options of a ``benchmarks.learning`` command, without the options that the runs of a group vary."""
    _, *found = command.split(" --")
    different = ("env", "algo", "seeds", "name", "jobs")
    return "".join(sorted(f" --{option}" for option in found if option.split()[0] not in different))


def seed_range(seeds: Sequence[int]) -> str:
    """Format seeds for ``--seeds``."""
    is_range = len(seeds) > 1 and list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]}-{seeds[-1]}" if is_range else ",".join(map(str, seeds))


def commands() -> str:
    """Generate the commands of all runs. Environments and algorithms with the same options share a line."""
    seeds: dict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for folder in sorted(FOLDER.glob("*/*")):
        for run in [] if folder.name.startswith(PREFIXES) else read(folder.parent.name, folder.name):
            seeds[run["env"], run["name"], run["algo"], options(run["command"])].append(run["seed"])
    envs: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for (env_id, name, algo, others), found in seeds.items():
        envs[name, algo, seed_range(found), others].append(env_id)
    # With several algorithms, --name is the prefix of their folders
    algos: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for (name, algo, range_, others), env_ids in envs.items():
        algos[" ".join(env_ids), range_, others, name.removesuffix(algo)].append(algo)
    lines = ["```"]
    for (joined, range_, others, begin), which in sorted(algos.items()):
        name = begin.removesuffix("-") if len(which) > 1 or not begin.endswith("-") else f"{begin}{which[0]}"
        given = ("" if which == ["reinforce"] else f" --algo {' '.join(which)}") + (f" --name {name}" if name else "")
        lines.append(f"python -m benchmarks.learning --env {joined}{given} --seeds {range_}{others}")
    return "\n".join([*lines, "```"])


def group_table(group: Group) -> str:
    """Create a table with one row per environment and variant."""
    rows: list[tuple[Any, ...]] = []
    for env_id in group_envs(group):
        for name in group.colors:
            returns = finals(env_id, group.prefix + name)
            if len(returns):
                rows.append((env_id, name, len(returns), cells(returns)))
    return markdown(["environment", group.column, "seeds", "return: IQM [95% interval]", "worst and best seed"], rows)


def group_envs(group: Group) -> list[str]:
    """Return the environments with runs of a group."""
    return sorted({path.parent.name for path in FOLDER.glob(f"*/{group.prefix}*")}, reverse=True)


def band(axes: Any, runs: list[dict[str, Any]], what: str, color: str, label: str) -> None:
    """Plot the median and the interquartile band of the evaluations over runs, against steps or seconds."""
    # Runs can stop early: end with the shortest run
    end = min(run["evaluations"][-1][what] for run in runs)
    grid = np.linspace(min(end, max(run["evaluations"][0][what] for run in runs)), end, 60)
    returns = [
        np.interp(grid, [p[what] for p in run["evaluations"]], [p["mean_return"] for p in run["evaluations"]]) for run in runs
    ]
    low, middle, high = np.percentile(returns, [25, 50, 75], axis=0)
    axes.plot(grid, middle, color=color, label=f"{label}, {count(runs, 'seed')}")
    axes.fill_between(grid, low, high, color=color, alpha=0.2, linewidth=0)


def curves(env_id: str, path: Path) -> None:
    """Plot the evaluations against steps and against seconds."""
    runs_of = {name: read(env_id, name) for name in COLORS}
    # A curve needs at least two evaluations
    runs_of = {name: [run for run in runs if len(run["evaluations"]) > 1] for name, runs in runs_of.items()}
    if not any(runs_of.values()):
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, constrained_layout=True)
    for name, runs in runs_of.items():
        for axes, what in zip(panels, ("steps", "seconds"), strict=True):
            # A2C and Tianshou have no other runs
            is_shown = env_id != LANDER or (what == "seconds") == (name in IN_TURN)
            if runs and is_shown and name in IN_TURN:
                # These runs end at different times
                for run in runs:
                    # Other runs of the same algorithms have a label in the left panel
                    label = name.removeprefix("race-") if run is runs[0] and name in ("race-workers", "race-envpool") else None
                    x, y = zip(*((point[what], point["mean_return"]) for point in run["evaluations"]), strict=True)
                    axes.plot(x, y, "-o", color=COLORS[name], linewidth=0.8, markersize=4, markevery=[-1], label=label)
            elif runs and is_shown:
                band(axes, runs, what, COLORS[name], re.sub("^(race|final)-|-300k$", "", name))
    panels[0].set(xlabel="steps", ylabel="return of the deterministic policy", title=env_id)
    panels[0].set_xlim(left=0)
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    seconds = ", until the first evaluation of 200" if env_id == LANDER else ""
    panels[1].set(xlabel=f"seconds of training{seconds}", xscale="log")
    panels[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[1].xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panels[1].xaxis.set_minor_formatter(NullFormatter())
    for axes in panels:
        if env_id == LANDER:
            axes.axhline(SOLVED, color="gray", linestyle=":")
            # A2C starts far below
            axes.set_ylim(bottom=-300)
    # On the lander, the panels have different runs
    entries = () if env_id == LANDER else panels[0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)


def group_curves(group: Group) -> None:
    """Plot the evaluations of a group against steps, with one panel per environment."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    env_ids = group_envs(group)
    n_rows = (len(env_ids) + 2) // 3
    size = (max(7, 5 * min(3, len(env_ids))), 3.8 * n_rows + 0.8)
    figure, panels = plt.subplots(n_rows, min(3, len(env_ids)), figsize=size, squeeze=False, constrained_layout=True)
    for axes, env_id in zip(panels.flat, env_ids, strict=False):
        for name, color in group.colors.items():
            if runs := read(env_id, group.prefix + name):
                band(axes, runs, "steps", color, name)
        axes.set(xlabel="steps", title=env_id)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if env_id == LANDER:
            axes.axhline(SOLVED, color="gray", linestyle=":")
    panels[0, 0].set_ylabel("return of the deterministic policy")
    entries = {label: line for axes in panels.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3)
    figure.savefig(IMAGES / f"{group.page.stem}.png", dpi=100)


def headline() -> str:
    """Generate the summary of learning performance in the README."""
    lines = []
    for name, label in (("defaults", "Defaults"), ("reinforce-300k", "`reinforce.yml`")):
        if not (runs := [run for run in read(LANDER, name) if run["final_returns"]]):
            continue
        returns, first = finals(LANDER, name), np.array([reached_at(run, "steps") for run in runs])
        millions = np.median([run["timesteps"] for run in runs]) / 1e6
        lines.append(
            f"- {label}, {millions:.1f} million steps: {np.sum(returns >= SOLVED)} of {len(returns)} seeds return 200 or "
            f"more, IQM {score(returns)}, worst {returns.min():.0f}, best {returns.max():.0f}. The median seed first passes "
            f"200 after {np.median(first):,.0f} steps, the first after {first.min():,.0f}, and the last after "
            f"{first.max():,.0f}."
        )
    races = {name: found for name in ("defaults", "reinforce", "trpo", "ppo") if (found := race(name)) is not None}
    if "defaults" in races:
        ours = races["defaults"].seconds
        longer = [f"{name.upper()} {measured(races[name].seconds / ours, '.1f')}" for name in ("trpo", "ppo") if name in races]
        lines.append(
            f"- Median time to the first pass, relative to REINFORCE with its defaults, with one thread each: "
            f"{', '.join(longer)}. TRPO and PPO use RL Zoo's hyperparameters and budgets; a run that never passes counts as "
            "infinite."
        )
    return "\n".join(
        [f"{LANDER}, seeds that were not used for tuning, 100 deterministic episodes per final policy:", "", *lines]
    )


def stops() -> str:
    """Describe the length of `make train`, which has the hyperparameters of reinforce.yml."""
    if not (steps := [reached_at(run, "steps", 250.0) for run in read(LANDER, "reinforce-300k")]):
        return "It stops when an evaluation reaches a mean return of 250."
    return (
        f"It stops when an evaluation reaches a mean return of 250: after {min(steps):,.0f} to {max(steps):,.0f} steps with "
        f"{len(steps)} seeds, with a median of {np.median(steps):,.0f}. The number depends on seed and processor."
    )


def peers() -> str:
    """Create a table of steps and seconds to a return of 200, and of final returns."""
    rows: list[tuple[Any, ...]] = []
    for name, (label, folder) in PEERS.items():
        way = "not measured | |"
        if (found := race(name)) is not None:
            way = f"{measured(found.steps, ',.0f')} | {measured(found.seconds, '.1f')} | {found.passed}"
        final, runs, returns = "not measured |", read(LANDER, folder), finals(LANDER, folder)
        # Races only have final returns of runs that never pass: a score of some runs would be biased
        if runs and len(returns) == len(runs):
            millions = np.median([run["timesteps"] for run in runs]) / 1e6
            final = f"{score(returns)} | {millions:.1f} M, {len(runs)}"
        rows.append((label, way, final))
    return markdown(
        [
            "algorithm",
            "steps to 200",
            "seconds",
            "passed",
            "final return",
            "after, seeds",
        ],
        rows,
    )


def mujoco() -> str:
    """Create a table of final returns on MuJoCo, with published returns of plain policy gradients and TRPO."""
    rows: list[tuple[Any, ...]] = []
    for task, others in MUJOCO.items():
        for name, label in (("reinforce", task), ("defaults", f"{task}, defaults")):
            if len(returns := finals(f"{task}-v5", name)):
                mark = "**" if iqm(returns) >= max(other for other in others[:2] if other is not None) else ""
                steps = np.median([run["timesteps"] for run in read(f"{task}-v5", name)])
                texts = ["-" if other is None else f"{other:g}" for other in others]
                worst_best = f"{returns.min():.1f}, {returns.max():.1f}"
                ours = (f"{steps / 1e6:.2g} M", len(returns), score(returns, digits=1, bold=mark), worst_best)
                rows.append((label, *ours, *texts))
    return markdown(
        ["task", "steps", "seeds", "return: IQM [95% interval]", "worst and best seed", "Tianshou", "Spinning Up", "TRPO"],
        rows,
    )


def beside() -> str:
    """Create a table of final returns of REINFORCE, TRPO and A2C on MuJoCo, with the probability of improvement."""
    rows: list[tuple[Any, ...]] = []
    for task, name_of_ours in BESIDE.items():
        ours = finals(f"{task}-v5", name_of_ours)
        for name in (name_of_ours, "trpo", "a2c"):
            if not (runs := read(f"{task}-v5", name)):
                continue
            returns = finals(f"{task}-v5", name)
            steps, seconds = (np.median([run[what] for run in runs]) for what in ("timesteps", "seconds"))
            better = "" if name == name_of_ours else where_figures.better(ours, returns)
            rows.append((task, name, len(runs), f"{steps / 1e6:.2g} M", f"{seconds:.0f}", score(returns), better))
    return markdown(
        ["task", "algorithm", "seeds", "steps", "seconds per run", "return: IQM [95% interval]", "REINFORCE is better"], rows
    )


def search() -> str:
    """Create a table of mean returns with other settings, and with the defaults on the same seeds, used for tuning."""
    rule = ("0.0125 min(1, max(4 signal, 1 / (1 + n / 40)))", "0", "clipped")
    returns: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    with (RESULTS / "step_search.csv").open() as file:
        for row in csv.DictReader(file):
            if (row["rule_of_target_kl"], row["prior_of_signal"], row["log_prob"]) == rule:
                returns[row["env"], row["steps"], row["other_settings"]][row["seed"]] = float(row["final_return"])
    rows: list[tuple[Any, ...]] = []
    for env_id, steps in sorted({(env_id, steps) for env_id, steps, _ in returns}):
        for settings in TRIED:
            ours, others = returns[env_id, steps, "{}"], returns[env_id, steps, json.dumps(settings)]
            if seeds := sorted(ours.keys() & others.keys()):
                means = [
                    f"{np.mean([found[seed] for seed in seeds]):.4g}, {min(found[seed] for seed in seeds):.4g}"
                    for found in (ours, others)
                ]
                rows.append((env_id, ", ".join(f"`{name}={value}`" for name, value in settings.items()), len(seeds), *means))
    return markdown(["environment", "settings", "seeds", "defaults: mean, worst", "settings: mean, worst"], rows)


def main() -> None:
    where_figures.main()
    for folder in sorted(FOLDER.iterdir()):
        curves(folder.name, IMAGES / f"learning_{folder.name}.png")
    fill(PAGE, "learning", table())
    fill(PAGE, "commands", commands())
    fill(PAGE, "mujoco", mujoco())
    fill(PAGE, "beside", beside())
    fill(STEP, "search", search())
    fill(README, "headline", headline())
    fill(README, "stops", stops())
    fill(README, "peers", peers())
    print(f"{table()}\n\n{headline()}")
    for group in filter(group_envs, GROUPS):
        group_curves(group)
        fill(group.page, group.block, group_table(group))
        print(f"\n{group_table(group)}")


if __name__ == "__main__":
    main()
