"""Training with the true simulator in the world model's place: what a perfect model would be worth.

python -m benchmark.oracle --env-id 3s_vs_5z                 D_m: what would really have happened
python -m benchmark.oracle --env-id 3s_vs_5z --model obs     the same, observations by LOGO
python -m benchmark.oracle --env-id 3s_vs_5z --windows       D_m: recorded windows of H steps

All other flags are those of train.py. `Oracle` rolls the policy out in the simulator from states of
the recording. Each part of a step (observations, states, rewards, ends, available actions) can be
LOGO's prediction instead; all of them together are LOGO. `Windows` fills D_m with recorded steps:
this placebo changes nothing but the way in which batches are put together.

In SMAX the recording is played once more to know the simulator's own states. A robot's state is
known from its observation, up to rounding and the contacts of its last step; of Hopper's and
Walker2d's velocities the observation has no more than 10 (cut in 10 % of Hopper-3x1 medium's rows).

At the end, depth.json compares the critics' values with what the policy really gets (`by_depth`).

Sizes: B rollouts, H horizon, N agents, O observation, S state, A action, K critics, R rows of D.
"""

import argparse
import importlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import envs
import train
from behaviour import record
from buffer import OfflineDataset
from datasets import one_sentence, read_episodes, write_atomic
from experiment import setup
from experiment.stopping import saying_how_to_go_on
from logo_wm import LogoWM
from simulators.mamujoco import MamujocoEnv

PARTS = ("obs", "state", "reward", "end", "avail")


# --------------------------------------------------------------------------------------------------
# Simulators that start from recorded rows
# --------------------------------------------------------------------------------------------------


def replay_smax(data: OfflineDataset, metadata: dict):
    """SMAX's own state before every row of a recording: a JAX tree of arrays (R,...).

    A recording holds the episodes of one policy after the other, each in rounds of as many as the
    simulator has slots; the last round of a policy may be cut.

    Raises:
        ValueError: it is not one of our recordings, or this machine computes differently.
    """
    if metadata.get("backend") != "smax" or "quality" not in metadata:
        raise ValueError(f"{metadata['path']} is not a recording of SMAX by this program.")
    policies = len(record.policies_of(metadata["quality"], list(range(6))))
    count, lengths = int(metadata["episodes"]), data.lengths.numpy()
    env = envs.make(metadata["env_id"], record.slots(policies, count))
    obs, actions = data.obs.cpu().numpy(), data.actions.cpu().numpy()
    first_rows = np.cumsum(lengths + 1) - lengths - 1  # (episodes,)
    states, first = None, 0
    tree = importlib.import_module("jax").tree  # after envs has chosen JAX's device
    for k, rounds in enumerate(record.starts(policies, count, int(metadata["seed"])).tolist()):
        last = first + count // policies + (k < count % policies)  # of this policy's episodes
        for seed in rounds:
            episodes = np.arange(first, min(first + env.num_envs, last))
            if not len(episodes):  # of a policy with one episode less there is no further round
                continue
            first = episodes[-1] + 1
            now = env.reset(seed)
            for t in range(lengths[episodes].max() + 1):
                running = np.flatnonzero(lengths[episodes] >= t)  # slots
                rows = first_rows[episodes[running]] + t
                if not np.array_equal(now.obs[running], obs[rows]):
                    raise ValueError(
                        f"{metadata['path']} was recorded on a machine that computes differently: "
                        "delete it, and it is recorded here."
                    )
                now_inside = env.snapshot()
                if states is None:
                    states = tree.map(lambda x: np.zeros((len(obs), *x.shape[1:]), x.dtype),
                                      now_inside)  # fmt: skip
                for kept, x in zip(tree.leaves(states), tree.leaves(now_inside), strict=True):
                    kept[rows] = x[running]
                chosen = np.zeros((env.num_envs, *actions.shape[1:]), np.float32)
                chosen[running] = actions[rows]
                now = env.step(chosen)
    return states


class Smax:
    """B rollouts in SMAX from rows of a recording."""

    def __init__(self, data: OfflineDataset, metadata: dict):
        self.env_id, self.states = metadata["env_id"], replay_smax(data, metadata)

    def start(self, rows: np.ndarray, seed: int) -> None:
        """Put B rollouts into the states of these rows of D; seed: of the randomness to come."""
        self.env = envs.make(self.env_id, len(rows))
        tree_map = importlib.import_module("jax").tree.map
        self.env.restore(tree_map(lambda x: x[rows], self.states), seed)

    def step(self, actions: np.ndarray) -> envs.Step:
        """As `SmaxEnv.step`."""
        return self.env.step(actions)


class Robot:
    """B rollouts of a robot from rows of a recording, computed one after the other."""

    def __init__(self, data: OfflineDataset, metadata: dict):
        self.env = MamujocoEnv(metadata["env_id"], 1, 0)
        self.robot = self.env.robots[0].unwrapped
        self.recorded = data.state.cpu().numpy()
        self.env.reset(0)

    def start(self, rows: np.ndarray, seed: int) -> None:
        """As `Smax.start`; robots have no randomness."""
        self.inside = list(zip(*self.env.inside(self.recorded[rows]), strict=True))
        self.state, self.done = self.recorded[rows].copy(), np.zeros(len(rows), bool)

    def step(self, actions: np.ndarray) -> envs.Step:
        """As `MamujocoEnv.step`; no time limit."""
        joint = self.env.partition.join(actions.astype(np.float64)) * self.env.strength
        reward, terminated = np.zeros(len(joint), np.float32), np.zeros(len(joint), bool)
        for k in np.flatnonzero(~self.done):
            self.robot.set_state(*self.inside[k])
            self.state[k], reward[k], terminated[k], _, _ = self.robot.step(joint[k])
            self.inside[k] = self.robot.data.qpos.copy(), self.robot.data.qvel.copy()
        self.done = self.done | terminated
        no, obs = np.zeros(len(joint), bool), self.env.partition.observe(self.state)
        return envs.Step(obs, self.state.copy(), None, reward, terminated, no, no, self.done)


# --------------------------------------------------------------------------------------------------
# World models that are not learned
# --------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """The simulator as a world model, with LOGO's prediction in the place of some parts of a step.

    Args:
        model: LOGO, trained as usual. simulator: `Smax` or `Robot` on `data`.
        by_model: those of PARTS that LOGO predicts.
    """

    compilable = ()

    def __init__(self, model: LogoWM, simulator, data: OfflineDataset, by_model: tuple[str, ...]):
        super().__init__()
        self.model, self.simulator, self.by_model = model, simulator, by_model
        self.row_of = {x.tobytes(): k for k, x in enumerate(data.state.cpu().numpy())}

    def loss(self, batch):
        """LOGO's."""
        return self.model.loss(batch)

    @torch.no_grad()
    def imagine(self, policy: Callable, starts, horizon: int, generator: torch.Generator) -> dict:
        """As `LogoWM.imagine`. What LOGO predicts is fed back to the policy and to LOGO; the
        simulator goes on from its own state. Where nothing is LOGO's, the uncertainty is zero."""
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        self.simulator.start(self.rows(starts), seed)
        model, theirs = self.model, self.by_model
        clamp = model.clamp_to_data if model.clamp else lambda name, x: x
        obs, state, avail = starts.obs, starts.state, starts.avail
        if "avail" in theirs and avail is not None and not model.heads:
            avail = torch.ones_like(avail)
        states = {"obs": [obs], "state": [state], "avail": [avail]}
        steps = {k: [] for k in ("actions", "reward", "terminated", "uncertainty", "valid")}
        valid = torch.ones_like(state[:, 0])
        for _ in range(horizon):
            actions = policy(obs, avail, generator)
            out = {"uncertainty": 0 * valid}
            if theirs:
                out = model.step(obs, state, actions)
            now = self.simulator.step(actions.cpu().numpy())
            true = {k: torch.tensor(getattr(now, k), dtype=torch.float32, device=obs.device)
                    for k in ("obs", "state", "reward", "terminated", "truncated")}  # fmt: skip
            obs, state, reward = true["obs"], true["state"], true["reward"]
            if "obs" in theirs:
                obs = clamp("obs", out["next_obs"])
            if "state" in theirs:
                state = clamp("state", out["next_state"])
            if avail is not None and "avail" not in theirs:
                avail = torch.tensor(now.avail, device=obs.device)
            elif avail is not None and model.heads:
                avail = out["next_avail"]
            terminated, done = true["terminated"], true["terminated"] + true["truncated"]
            if "end" in theirs and not model.heads:
                terminated = done = torch.zeros_like(valid)
            elif "end" in theirs:
                draw = torch.rand(valid.shape, generator=generator, device=obs.device)
                terminated = done = (draw < out["terminated"]).float()
            if "reward" in theirs:
                reward = torch.where(terminated > 0, out["last_reward"], out["continuing_reward"])
                reward = clamp("reward", reward)
            for name, x in zip(steps, (actions, reward, terminated, out["uncertainty"], valid),
                               strict=True):  # fmt: skip
                steps[name].append(x)
            for name, x in zip(states, (obs, state, avail), strict=True):
                states[name].append(x)
            valid = valid * (1 - done)
        return {k: torch.stack(v) for k, v in (states | steps).items() if v[0] is not None}

    def rows(self, starts) -> np.ndarray:
        """The rows of D in which these transitions start (B,)."""
        return np.array([self.row_of[x.tobytes()] for x in starts.state.cpu().numpy()])


class Windows(nn.Module):
    """Recorded steps as rollouts: from each start what was recorded, up to the episode's end.

    Nothing is learned. Phase 1 draws its batches all the same, so that those of the policies are
    the same as LOGO's, and descends on a number that nobody uses.
    """

    compilable = ()

    def __init__(self, data: OfflineDataset):
        super().__init__()
        self.data, self.unused = data, nn.Parameter(torch.zeros((), device=data.obs.device))
        self.row_of = {x.tobytes(): k for k, x in enumerate(data.state.cpu().numpy())}

    rows = Oracle.rows

    def loss(self, batch):
        """Zero."""
        loss = self.unused.square()
        return loss, {"L": loss.detach()}

    def imagine(self, policy: Callable, starts, horizon: int, generator: torch.Generator) -> dict:
        """As `LogoWM.imagine`; the policy does not act."""
        data, device = self.data, self.data.obs.device
        first = torch.tensor(self.rows(starts), device=device)  # (B,)
        steps = torch.arange(horizon + 1, device=device).unsqueeze(-1)
        rows = (first + steps).clamp(max=len(data.obs) - 1)  # (H+1,B)
        valid = (steps[:-1] < data.left[first]).float()  # a final observation is no step
        states = {"obs": data.obs, "state": data.state, "avail": data.avail}
        steps = {"actions": data.actions, "reward": data.reward, "terminated": data.terminated}
        return {
            **{k: x[rows] for k, x in states.items() if x is not None},
            **{k: x[rows[:-1]] for k, x in steps.items()},
            "uncertainty": torch.zeros_like(valid),
            "valid": valid,
        }


# --------------------------------------------------------------------------------------------------
# After training
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_depth(
    learner, model: LogoWM, simulator, data: OfflineDataset, gamma: float, horizon: int,
    count: int = 500, tail: int | None = None,
) -> dict[str, list]:  # fmt: skip
    """The critics' values along rollouts of the greedy policy, and what it really gets from there.

    Args:
        count: rollouts, from training rows.
        tail: steps for which rewards are summed up; None: until they are discounted to a hundredth,
            but no more than the longest recorded episode has.
    Returns:
        Lists of H numbers, over the rollouts that have not ended before: monte_carlo, the mean
        discounted return from step h on in the simulator; value_true and spread_true, mean and
        standard deviation over the critics (None of one) of Q at the simulator's states;
        value_imagined, spread_imagined: at those that LOGO imagines from the same starts.
    """
    if tail is None:
        tail = sum(gamma**k > 0.01 for k in range(data.longest))
    generator = torch.Generator(data.obs.device).manual_seed(0)
    starts = data.sample(count, generator)
    true = Oracle(model, simulator, data, ())

    def acting(obs, avail, generator):
        return learner.ema_actor.greedy(obs, avail)

    real = true.imagine(acting, starts, horizon + tail, generator)
    dream = model.imagine(acting, starts, horizon, generator)
    returns, later = [], torch.zeros_like(real["reward"][0])
    for h in reversed(range(horizon + tail)):
        later = real["reward"][h] + gamma * (1 - real["terminated"][h]) * later
        returns.insert(0, later)
    running = [x[v > 0] for x, v in zip(returns, real["valid"], strict=True)]
    measured = {"monte_carlo": [x.mean().item() if len(x) else None for x in running[:horizon]]}
    for name, rollout in (("true", real), ("imagined", dream)):
        value, spread = [], []
        for h in range(horizon):
            valid = rollout["valid"][h] > 0
            if not valid.any():  # LOGO may believe that all have ended
                value.append(None)
                spread.append(None)
                continue
            x = (rollout["obs"][h], rollout["state"][h], rollout["actions"][h])
            q = learner.critic(*(part[valid] for part in x))  # (K,B)
            value.append(q.mean().item())
            spread.append(q.std(0).mean().item() if len(q) > 1 else None)
        measured |= {f"value_{name}": value, f"spread_{name}": spread}
    return measured


def cli(argv: list[str] | None = None) -> dict:
    """The command line: an error is one sentence and a non-zero exit."""
    with one_sentence("python -m benchmark.oracle"):
        return run(argv)


def run(argv: list[str] | None) -> dict:
    """Train with the simulator as the world model; returns the content of final.json."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--model", nargs="*", default=[], choices=PARTS)
    own.add_argument("--windows", action="store_true")
    mine, flags = own.parse_known_args(argv)
    made = {}

    def learner(args, spec, data):
        made["learner"] = train.make_learner(args, spec, data)
        return made["learner"]

    def world_model(args, spec, data):
        if mine.windows:
            return Windows(data)
        made["model"], made["data"] = train.make_world_model(args, spec, data), data
        _, _, metadata = read_episodes(setup.find_dataset(args))
        made["simulator"] = (Smax if spec.discrete else Robot)(data, metadata)
        return Oracle(made["model"], made["simulator"], data, tuple(mine.model))

    name = "windows" if mine.windows else "-".join(["simulator", *mine.model])
    args = train.parse(flags)
    if args.out is None:
        folder = Path("runs") / f"{args.env_id}-{args.quality}-{name}-seed{args.seed}"
        flags, args.out = [*flags, "--out", str(folder)], folder
    if args.synthetic_fraction == 0:
        raise ValueError("--synthetic-fraction 0 leaves no place for a model.")
    mine_again = [*(["--windows"] if mine.windows else []), *(["--model"] if mine.model else [])]
    program = shlex.join(["-m", "benchmark.oracle", *mine_again, *mine.model])
    with saying_how_to_go_on(flags, program):
        final = train.main(args, learner=learner, world_model=world_model, method=name)
    if "simulator" in made:
        made["model"].eval()
        measured = by_depth(made["learner"], made["model"], made["simulator"], made["data"],
                            args.gamma, args.horizon)  # fmt: skip
        write_atomic(args.out / "depth.json", json.dumps(measured, indent=2).encode())
    return final


if __name__ == "__main__":
    cli()
