"""
Train REINFORCE on LunarLanderContinuous-v3, evaluate it, and write all results to one folder.

    python examples/lunar_lander.py                 # same as `make train`
    python examples/lunar_lander.py --seed 1 --threshold 280
    python examples/lunar_lander.py --resume runs/LunarLanderContinuous-v3_1

Training stops when an evaluation reaches the threshold. --resume continues a run that was stopped or killed from its last
checkpoint, with the same final weights as an uninterrupted run. The folder contains the model, monitor files (return, length
and time of each training episode), the TensorBoard log, a learning curve, a video of the trained policy, a summary, and
report.html, which shows all of this on one page.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import EvalCallback, EveryNTimesteps, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import load_results

from sb3_reinforce import REINFORCE, AtomicCheckpointCallback, newest_checkpoint, restore_evaluations

try:
    import imageio.v2 as imageio
    import imageio_ffmpeg  # noqa: F401
    from matplotlib.figure import Figure

    from sb3_reinforce.tools import write_report
except ImportError as error:
    raise SystemExit(f"{error}. Figures, videos and reports need: pip install 'sb3-reinforce[report]'") from error

ENV = "LunarLanderContinuous-v3"
SOLVED = 200.0
#: First seed of the evaluation environments: training seeds are below 2**31
EVALUATION_SEED = 2**31 + 10_000


class SeededEvaluations(EvalCallback):
    """Evaluate on the same episodes each time, and write ``evaluations.npz`` atomically."""

    def _on_step(self) -> bool:
        self.eval_env.seed(EVALUATION_SEED)
        continue_training = super()._on_step()
        Path(f"{self.log_path}.npz").replace(Path(str(self.log_path)).with_name("evaluations.npz"))
        return continue_training


def main() -> None:
    arguments = parse_arguments()
    folder = arguments.resume or new_folder(arguments)
    print(f"Training on {ENV} until an evaluation returns {arguments.threshold:g};\neverything goes to {folder}")
    # Small networks are fastest with one thread
    th.set_num_threads(1)

    # Limit episodes to 400 steps: a lander that hovers, or fires its engines on the ground, would take 1000
    env_kwargs = dict(render_mode=None, max_episode_steps=400)
    checkpoint = newest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        # Left by a run that was killed before its first checkpoint
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    monitor_kwargs = dict(override_existing=checkpoint is None)
    env = make_vec_env(ENV, n_envs=8, env_kwargs=env_kwargs, monitor_dir=str(folder), monitor_kwargs=monitor_kwargs)
    if checkpoint is None:
        model = REINFORCE(
            "MlpPolicy", env, n_steps=125, tensorboard_log=str(folder / "tensorboard"), seed=arguments.seed, device="cpu"
        )
    else:
        model = REINFORCE.load(checkpoint, env, device="cpu", tensorboard_log=str(folder / "tensorboard"))
        print(f"Resuming from {checkpoint}")
    evaluation_env = make_vec_env(ENV, n_envs=10, seed=EVALUATION_SEED, env_kwargs=dict(render_mode=None))
    stop = StopTrainingOnRewardThreshold(arguments.threshold)
    evaluations = SeededEvaluations(
        evaluation_env, callback_on_new_best=stop, n_eval_episodes=20, eval_freq=1, log_path=str(folder), verbose=0
    )
    evaluations.log_path = str(folder / ".evaluations")
    evaluate_now_and_then = EveryNTimesteps(10_000, evaluations)
    evaluate_now_and_then.last_time_trigger = restore_evaluations(evaluations, folder / "evaluations.npz", model.num_timesteps)
    checkpoints = AtomicCheckpointCallback(folder / "checkpoints", every_n_minutes=0.1, resume_command=resume_command(folder))
    callbacks = [evaluate_now_and_then, checkpoints]
    started, n_before = time.perf_counter(), model.num_timesteps
    try:
        model.learn(
            max(0, arguments.timesteps - model.num_timesteps),
            callback=callbacks,
            reset_num_timesteps=checkpoint is None,
            progress_bar=True,
        )
    except KeyboardInterrupt:
        # The checkpoint callback has printed the command to resume
        raise SystemExit(130) from None
    seconds = time.perf_counter() - started
    model.save(folder / "model")

    print(f"Evaluating the deterministic policy over {arguments.evaluation_episodes} episodes")
    # Use other episodes than during training
    evaluation_env.seed(EVALUATION_SEED + 1000)
    returns, lengths = evaluate_policy(model, evaluation_env, arguments.evaluation_episodes, return_episode_rewards=True)

    plot_learning_curve(folder, model.num_timesteps, np.array(returns))
    video_return = record_video(model, folder / "landing.mp4")
    result = dict(seed=arguments.seed, steps=model.num_timesteps, returns=returns, lengths=lengths)
    # A resumed run only knows the time of its last part
    result |= dict(seconds=seconds, steps_per_second=(model.num_timesteps - n_before) / seconds)
    write_summary(folder, model, result, video_return)
    write_report([folder])
    print(final_lines(folder, np.array(returns), video_return))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threshold", type=float, default=250.0, help="stop training at this mean return over 20 episodes")
    parser.add_argument("--timesteps", type=int, default=1_000_000, help="maximum number of training steps")
    parser.add_argument("--evaluation-episodes", type=int, default=100)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="parent folder of the new run")
    parser.add_argument("--resume", type=Path, help="resume the run in this folder, with its saved arguments")
    arguments = parser.parse_args()
    if arguments.resume is not None:
        try:
            saved = json.loads((arguments.resume / "arguments.json").read_text())
        except (OSError, ValueError) as error:
            raise SystemExit(f"--resume {arguments.resume}: no run to resume ({error})") from error
        parser.set_defaults(**saved)
        arguments = parser.parse_args()
    return arguments


def new_folder(arguments: argparse.Namespace) -> Path:
    """Create the next folder, runs/LunarLanderContinuous-v3_1, _2, ..., and save the arguments in it."""
    number = 1
    while (folder := arguments.runs / f"{ENV}_{number}").exists():
        number += 1
    folder.mkdir(parents=True)
    saved = {name: value for name, value in vars(arguments).items() if name not in ("runs", "resume")}
    (folder / "arguments.json").write_text(json.dumps(saved) + "\n")
    return folder


def python_command() -> str:
    """This interpreter, relative to the current folder if it is inside."""
    python = Path(sys.executable)
    return shlex.quote(str(python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python))


def resume_command(folder: Path) -> str:
    """Command for the current folder, with the number of threads, on which rounding depends."""
    threads = os.environ.get("OMP_NUM_THREADS")
    command = f"{python_command()} {shlex.join([sys.argv[0], '--resume', str(folder)])}"
    return command if threads is None else f"OMP_NUM_THREADS={threads} {command}"


def final_lines(folder: Path, returns: np.ndarray, video_return: float) -> str:
    """Return how good the policy is, where its files are, and how to watch it, for the terminal."""
    solved = f"{np.sum(returns >= SOLVED)} of {len(returns)} new episodes reach {SOLVED:.0f} (solved)"
    tensorboard = shlex.quote(str(folder / "tensorboard"))
    return f"""
The policy returns {returns.mean():.0f} ± {returns.std():.0f}: {solved}.
Everything is in {folder}:
  report.html          all results on one page, to open in a browser
  landing.mp4          video of one episode, return {video_return:.0f}
  learning_curve.png   training episodes and evaluations
  model.zip            for REINFORCE.load()
  summary.md           settings, versions and results; result.json for scripts
  tensorboard/         TensorBoard log
To watch the policy, open landing.mp4. To see the log in a browser:
  {python_command()} -m tensorboard.main --logdir {tensorboard}"""


def plot_learning_curve(folder: Path, last_step: int, final_returns: np.ndarray) -> None:
    """Plot training episodes, their mean over the last 100, evaluations, and the final evaluation against steps."""
    episodes = load_results(str(folder))
    returns, steps = episodes["r"].to_numpy(), episodes["l"].cumsum().to_numpy()
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, returns, ".", markersize=2, alpha=0.25, color="tab:blue", label="training episode")
    if len(returns) >= 100:
        mean = np.convolve(returns, np.full(100, 0.01), mode="valid")
        axes.plot(steps[99:], mean, color="tab:orange", linewidth=2, label="mean of the last 100")
    if (folder / "evaluations.npz").exists():
        evaluations = np.load(folder / "evaluations.npz")
        axes.plot(evaluations["timesteps"], evaluations["results"].mean(axis=1), "o-", color="tab:green", label="evaluation")
    label = f"final evaluation: {final_returns.mean():.0f} ({len(final_returns)} episodes)"
    axes.plot(last_step, final_returns.mean(), "*", markersize=14, color="tab:red", label=label)
    axes.axhline(SOLVED, color="gray", linestyle=":", label="solved")
    low = min(np.quantile(returns, 0.01), -100)
    axes.set(xlabel="steps", ylabel="return", title=f"REINFORCE on {ENV}", ylim=(low, 330))
    axes.legend(loc="lower right")
    figure.savefig(folder / "learning_curve.png", dpi=120)


def record_video(model: REINFORCE, path: Path, tries: int = 10) -> float:
    """
    Record an episode of the deterministic policy: the first one that reaches 200, or the last try.

    :return: return of the episode
    """
    # Render without a window
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    env = gym.make(ENV, render_mode="rgb_array")
    episode_return = -np.inf
    for seed in range(EVALUATION_SEED, EVALUATION_SEED + tries):
        # Frames have 600 x 400 pixels, multiples of 8
        video = imageio.get_writer(path, fps=50, macro_block_size=8)
        episode_return, is_over = 0.0, False
        observation, _ = env.reset(seed=seed)
        while not is_over:
            video.append_data(np.asarray(env.render()))
            action, _ = model.predict(observation, deterministic=True)
            observation, reward, terminated, truncated, _ = env.step(action)
            episode_return += float(reward)
            is_over = terminated or truncated
        video.close()
        if episode_return >= SOLVED:
            break
    env.close()
    return episode_return


def write_summary(folder: Path, model: REINFORCE, result: dict, video_return: float) -> None:
    """Write the results to result.json and summary.md."""
    packages = ("sb3-reinforce", "stable-baselines3", "gymnasium", "torch", "numpy")
    versions = {"python": platform.python_version(), **{package: version(package) for package in packages}}
    command = shlex.join(["python", *sys.argv])
    machine = dict(platform=platform.platform(), processors=os.cpu_count())
    saved = {"command": command, "versions": versions, "machine": machine, **result}
    (folder / "result.json").write_text(json.dumps(saved) + "\n")

    returns, steps = np.array(result["returns"]), result["steps"]
    training = f"{steps:,} steps, {result['steps_per_second']:,.0f} steps/s"
    path = shlex.quote(str(folder))
    settings = f"n_steps={model.n_steps}, target_kl={model.target_kl}, cg_damping={model.cg_damping}"
    summary = f"""# REINFORCE on {ENV}

| | |
| --- | --- |
| return of the deterministic policy, {len(returns)} new episodes | {returns.mean():.1f} ± {returns.std():.1f} |
| episodes with a return of at least {SOLVED:.0f} | {np.mean(returns >= SOLVED):.0%} |
| mean episode length | {np.mean(result["lengths"]):.0f} steps |
| training | {training} |
| settings | {model.n_envs} environments, {settings} |
| seed | {result["seed"]} |
| versions | {", ".join(f"{name} {number}" for name, number in versions.items())} |
| command | `{command}` |

- `model.zip`: `REINFORCE.load("{folder}/model")`; `checkpoints/`: used by `--resume {path}`
- `learning_curve.png`, `*.monitor.csv`: return and length of each training episode (read them with SB3's `load_results`)
- `evaluations.npz`: returns of the deterministic policy during training (SB3's `EvalCallback`)
- `landing.mp4`: one episode of the deterministic policy, return {video_return:.0f}
- `report.html`: all results on one page, with the video, hyperparameters and diagnostics
- `result.json`: results for scripts, with the return and length of each evaluation episode
- `tensorboard/`: `tensorboard --logdir {path}/tensorboard`
"""
    (folder / "summary.md").write_text(summary, encoding="utf-8")


if __name__ == "__main__":
    main()
