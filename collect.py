"""Behaviour policies, trained online, and the offline datasets recorded with them.

  python collect.py --env-id 3s_vs_5z                    retrain the behaviour policy from nothing
  python collect.py --env-id 3s_vs_5z --record medium    record a dataset with the shipped policy
  python collect.py --list                               all 8 x 4 datasets and their statistics

Offline data need somebody who played. Here that is MAPPO [Yu et al., 2022]: one actor shared by all
agents, one critic on the global state, PPO's clipped objective. Snapshots are kept on the way, and
the four qualities of the public benchmarks follow from them [CFCQL, OMIGA; README, Data]:

  medium         episodes of the snapshot that wins half as often as the expert
                 (where nobody wins anything: whose return is half the expert's)
  medium-replay  episodes of snapshots spread evenly up to medium, in equal parts
  expert         episodes of the final policy
  mixed          medium and expert, in equal parts

The snapshots are small (float16 arrays in behaviour/ENV_ID.npz, nothing pickled) and are shipped;
datasets are not: they are recorded at first use, reproducibly from a seed, and cached.

Sizes: T steps, E parallel episodes, N agents, O observation, S state, A actions, K snapshots.
"""

import argparse
import dataclasses
import hashlib
import io
import math
import sys
import time
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm

import datasets
import envs

Quality = Literal["medium", "medium-replay", "expert", "mixed"]
BEHAVIOUR = Path(__file__).parent / "behaviour"
CACHE = Path(__file__).parent / "data"
# Returns of the public medium datasets [OMIGA], which our medium policies are chosen to match
PUBLIC_MEDIUM = {"Hopper-3x1": 724.0, "Ant-2x4": 1419.0, "HalfCheetah-6x1": 1426.0}
ROBOT = {"episodes": 200, "num_envs": 8, "rows": 8_000, "total_steps": 3_000_000, "hidden": 64,
         "lr": 5e-4, "clip": 0.2, "entropy": 0.0, "epochs": 10, "minibatches": 16}  # fmt: skip
# Where the flags' defaults are not what the shipped policy was trained with
RECIPES = {
    "2s3z": {"total_steps": 2_000_000},
    **dict.fromkeys(envs.PAPER_MUJOCO, ROBOT),
}


@dataclasses.dataclass
class Args:
    """Train a behaviour policy, or record a dataset with a trained one."""

    env_id: str = "3s_vs_5z"
    """map to play"""
    record: Quality | None = None
    """record this dataset with the shipped policy instead of training one"""
    list: bool = False
    """print the statistics of the paper's 32 datasets; those not cached yet are recorded first"""
    episodes: int = 600
    """episodes to record (of robots 200)"""
    out: Path | None = None
    """where to write [default: behaviour/ENV_ID.npz, or the cache data/ for a recording]"""
    seed: int = 0
    """of the training, or of the recording"""
    num_envs: int = 128
    """E: battles played side by side, whole, between two PPO updates"""
    total_steps: int = 3_500_000
    """environment steps of the whole training, summed over battles (2s3z: 2M were enough)"""
    hidden: int = 128
    """width of the actor's two hidden layers; the critic is twice as wide"""
    lr: float = 1e-3
    """Adam's step size at the start, decayed linearly to zero"""
    gamma: float = 0.99
    """discount per step"""
    gae_lambda: float = 0.95
    """decay of the generalised advantage estimate"""
    clip: float = 0.1
    """how far one iteration may move a probability ratio from 1"""
    entropy: float = 0.01
    """weight of the entropy bonus, in nats"""
    epochs: int = 4
    """passes over each iteration's data"""
    minibatches: int = 4
    """optimiser steps per pass"""
    weakened: float = 0.0
    """share of the enemies that start with half their health at first; it falls by 0.01 after
    every iteration that wins half its battles, and only policies of the whole game (0) are kept as
    medium and expert: maps on which nobody wins by chance are learnt like this"""
    rows: int = 1
    """environment steps between two PPO updates, at least; whole rounds of episodes are played"""


# --------------------------------------------------------------------------------------------------
# Acting
# --------------------------------------------------------------------------------------------------


class Player(nn.Module):
    """The agents' behaviour policies pi_i(a|o^i), one network.

    Discrete: every agent is alike, logits of a masked softmax. Continuous: the agents drive
    different joints, so each is told its number; Gaussian with one learned spread per motor.

    Args:
        spec: of the environment. hidden: width of the two hidden layers.
    """

    def __init__(self, spec: envs.Spec, hidden: int):
        super().__init__()
        n, o, a = spec.num_agents, spec.obs_dim, spec.action_dim
        self.discrete = spec.discrete
        self.net = mlp(o if spec.discrete else o + n, hidden, a)
        if not spec.discrete:
            self.log_std = nn.Parameter(torch.full((n, a), -0.5))
            self.register_buffer("obs_mean", torch.zeros(n, o))
            self.register_buffer("obs_std", torch.ones(n, o))
            self.register_buffer("number", torch.eye(n), persistent=False)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """(...,N,O) -> (...,N,A): logits, or means."""
        if self.discrete:
            return self.net(obs)
        x = ((obs - self.obs_mean) / self.obs_std).clamp(-10, 10)
        return self.net(torch.cat([x, self.number.expand(*x.shape[:-1], -1)], -1))

    def distribution(self, obs: torch.Tensor, avail: torch.Tensor | None):
        """log pi(.|o) (...,N,A), forbidden actions very negative; or (means, log_std)."""
        out = self(obs)
        if self.discrete:
            return out.masked_fill(avail == 0, -1e9).log_softmax(-1)
        return out, self.log_std.expand_as(out)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two hidden layers with tanh."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.Tanh(),
        nn.Linear(hidden, hidden), nn.Tanh(),
        nn.Linear(hidden, outputs),
    )  # fmt: skip


def draw(player: Player, obs, avail, generator: torch.Generator) -> torch.Tensor:
    """One action each (...,N,A): one-hot, or Gaussian (to be cut to [-1,1] by the environment)."""
    if not player.discrete:
        mean, log_std = player.distribution(obs, avail)
        return mean + log_std.exp() * torch.randn(mean.shape, generator=generator)
    flat = player.distribution(obs, avail).flatten(0, -2).exp()
    choice = torch.multinomial(flat, 1, generator=generator)  # (rows,1)
    return torch.zeros_like(flat).scatter_(1, choice, 1.0).view(*obs.shape[:-1], -1)


def log_prob_and_entropy(player: Player, obs, avail, actions) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi_i(a^i|o^i) and the entropy of pi_i, both (...,N), nats."""
    if player.discrete:
        log_pi = player.distribution(obs, avail)
        return (log_pi * actions).sum(-1), -(log_pi.exp() * log_pi).sum(-1)
    mean, log_std = player.distribution(obs, avail)
    z = (actions - mean) / log_std.exp()
    log_density = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
    return log_density.sum(-1), (log_std + 0.5 + 0.5 * math.log(2 * math.pi)).sum(-1)


@torch.no_grad()
def play(env, player: Player, generator: torch.Generator, seed: int) -> dict[str, np.ndarray]:
    """One whole episode in each slot.

    Returns arrays obs (T+1,E,N,O), state (T+1,E,S), avail (T+1,E,N,A) or None, actions (T,E,N,A),
    reward, terminated, won (T,E) and filled (T,E): 1 while the slot's episode was running.
    """
    keys = ("obs", "state", "avail", "actions", "reward", "terminated", "won", "filled")
    log = {k: [] for k in keys}
    now = env.reset(seed)
    while True:
        for k in ("obs", "state", "avail"):
            log[k].append(getattr(now, k))
        if now.over.all():
            break
        avail = None if now.avail is None else torch.tensor(now.avail)
        actions = draw(player, torch.tensor(now.obs), avail, generator).numpy()
        filled, now = ~now.over, env.step(actions)
        step = (actions, now.reward, now.terminated, now.won, filled)
        for k, value in zip(keys[3:], step, strict=True):
            log[k].append(value)
    return {k: None if v[0] is None else np.stack(v) for k, v in log.items()}


# --------------------------------------------------------------------------------------------------
# Training the behaviour policy
# --------------------------------------------------------------------------------------------------


def advantages(reward, value, terminated, filled, gamma: float, lam: float) -> torch.Tensor:
    """Generalised advantage estimate (T,E) of value (T+1,E); a time limit keeps its bootstrap."""
    out, carry = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        delta = reward[t] + gamma * (1 - terminated[t]) * value[t + 1] - value[t]
        carry = filled[t] * (delta + gamma * lam * (1 - terminated[t]) * carry)
        out[t] = carry
    return out


class RunningMoments:
    """Mean and standard deviation of all rows seen so far, column by column [Chan et al., 1983]."""

    def __init__(self):
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def add(self, x: torch.Tensor) -> None:
        """x (rows, ...)."""
        total, delta = self.count + len(x), x.mean(0) - self.mean
        self.m2 = self.m2 + ((x - x.mean(0)) ** 2).sum(0) + delta**2 * self.count * len(x) / total
        self.mean, self.count = self.mean + delta * len(x) / total, total

    def std(self, floor: float) -> torch.Tensor:
        return (self.m2 / self.count).sqrt().clamp(min=floor)


def train_behaviour(args: Args) -> dict[str, np.ndarray]:
    """MAPPO from nothing; returns the arrays that `save_behaviour` stores."""
    env = envs.make(args.env_id, args.num_envs)
    spec, torch_rng = env.spec, torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    player = Player(spec, args.hidden)
    critic = mlp(spec.state_dim, 2 * args.hidden, 1)
    nn.init.zeros_(player.net[-1].weight)  # start uniform: early advantages are noise
    both = [*player.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(both, lr=args.lr, fused=True, eps=1e-5)
    steps, curve, snapshots, weakened = 0, [], [], args.weakened
    of_obs, of_state, of_return = RunningMoments(), RunningMoments(), RunningMoments()
    bar = tqdm(total=args.total_steps, unit="step", unit_scale=True, desc=f"MAPPO {args.env_id}")
    while steps < args.total_steps:
        rounds, before = [], steps
        if spec.discrete:
            env.weakened = weakened
        while not rounds or steps - before < args.rows:
            seed = args.seed * 10**6 + before + len(rounds)
            rounds.append(play(env, player, torch_rng, seed))
            steps += int(rounds[-1]["filled"].sum())
        logs = [{k: None if v is None else torch.as_tensor(v, dtype=torch.float32)
                 for k, v in r.items()} for r in rounds]  # fmt: skip
        for log in logs:
            of_state.add(torch.cat([log["state"][:-1][log["filled"].bool()]]))
            if not spec.discrete:
                of_obs.add(log["obs"][:-1][log["filled"].bool()])
                of_return.add(discounted(log["reward"], args.gamma)[log["filled"].bool()])
        if not spec.discrete and not curve:  # later the observations' scale stays as it is
            player.obs_mean.copy_(of_obs.mean)
            player.obs_std.copy_(of_obs.std(1e-2))
        scale = 10.0 if spec.discrete else of_return.std(1e-3)  # values near 1 keep the critic tame
        parts = [iteration_rows(args, player, critic, log, of_state, scale) for log in logs]
        rows = {k: None if parts[0][k] is None else torch.cat([p[k] for p in parts])
                for k in parts[0]}  # fmt: skip
        rows["adv"] = (rows["adv"] - rows["adv"].mean()) / (rows["adv"].std() + 1e-8)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * max(0.0, 1 - before / args.total_steps)
        ppo_epochs(args, player, critic, optimizer, both, rows, torch_rng)
        returns = np.concatenate([r["reward"].sum(0) for r in rounds])
        won = np.concatenate([r["won"].any(0) for r in rounds])
        curve.append((steps, returns.mean(), won.mean(), weakened))
        snapshots.append({k: v.half().numpy() for k, v in player.state_dict().items()})
        bar.update(steps - before)
        told = {"return": f"{returns.mean():.1f}", "won": f"{won.mean():.0%}"}
        bar.set_postfix(told | ({"weakened": f"{weakened:.2f}"} if weakened else {}))
        if won.mean() > 0.5:
            weakened = max(0.0, round(weakened - 0.01, 6))
    bar.close()
    return select_snapshots(np.array(curve), snapshots, PUBLIC_MEDIUM.get(args.env_id))


def discounted(reward: torch.Tensor, gamma: float) -> torch.Tensor:
    """Discounted sum of the rewards up to each step (T,E), whose spread is the critic's scale."""
    out, carry = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in range(len(reward)):
        carry = out[t] = gamma * carry + reward[t]
    return out


@torch.no_grad()
def iteration_rows(args, player, critic, log, of_state, scale) -> dict[str, torch.Tensor | None]:
    """The running steps of one round as rows, with advantages and the critic's targets."""
    on = log["filled"].bool()
    state = (log["state"] - of_state.mean) / of_state.std(1e-2)  # map units beside flags
    value = critic(state).squeeze(-1)  # (T+1,E)
    adv = advantages(log["reward"] / scale, value, log["terminated"], log["filled"],
                     args.gamma, args.gae_lambda)  # fmt: skip
    rows = {
        "obs": log["obs"][:-1][on],
        "avail": None if log["avail"] is None else log["avail"][:-1][on],
        "actions": log["actions"][on],
        "state": state[:-1][on],
        "target": (adv + value[:-1])[on],
        "adv": adv[on],
    }
    rows["old"] = log_prob_and_entropy(player, rows["obs"], rows["avail"], rows["actions"])[0]
    return rows


def ppo_epochs(args, player, critic, optimizer, parameters, rows, generator) -> None:
    """Several passes of PPO's clipped objective over one iteration's rows."""
    for _ in range(args.epochs):
        order = torch.randperm(len(rows["adv"]), generator=generator)
        for part in order.chunk(args.minibatches):
            b = {k: None if v is None else v[part] for k, v in rows.items()}
            log_pi, entropy = log_prob_and_entropy(player, b["obs"], b["avail"], b["actions"])
            ratio = (log_pi - b["old"]).exp()  # (R,N)
            adv = b["adv"].unsqueeze(-1)
            gain = torch.minimum(ratio * adv, ratio.clamp(1 - args.clip, 1 + args.clip) * adv)
            error = critic(b["state"]).squeeze(-1) - b["target"]
            loss = 0.5 * error.square().mean() - gain.mean() - args.entropy * entropy.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()


def select_snapshots(
    curve: np.ndarray, snapshots: list, medium_return: float | None = None, replay: int = 5
) -> dict:
    """Keep `replay` snapshots spread up to medium, medium last, then the final one.

    Args:
        curve: (iterations,4) of environment steps, mean return, win rate and weakened enemies.
        snapshots: per iteration, the player's state_dict.
        medium_return: what medium should reach; None: half of what the final policy wins.
    """
    goal = curve[:, 2] if curve[-1, 2] > 0 else curve[:, 1]
    smooth = np.array([goal[max(0, i - 4) : i + 5].mean() for i in range(len(goal))])
    aim = smooth[-1] / 2 if medium_return is None else medium_return
    aside = np.abs(smooth - aim) + 1e9 * (curve[:, 3] > 0)  # of another game
    medium = int(aside.argmin())
    kept = [round(medium * (k + 1) / replay) for k in range(replay)] + [len(curve) - 1]
    weights = {k: np.stack([snapshots[i][k] for i in kept]) for k in snapshots[0]}
    return {**weights, "snapshot_steps": curve[kept, 0], "curve": curve.astype(np.float32)}


# --------------------------------------------------------------------------------------------------
# Recording
# --------------------------------------------------------------------------------------------------


def load_behaviour(env_id: str, spec: envs.Spec) -> list[Player]:
    """The shipped snapshots as actors, medium the last but one, expert the last.

    Raises:
        FileNotFoundError: no behaviour policy is shipped for this map.
    """
    path = BEHAVIOUR / f"{env_id}.npz"
    if not path.exists():
        shipped = ", ".join(sorted(p.stem for p in BEHAVIOUR.glob("*.npz")))
        raise FileNotFoundError(
            f"No behaviour policy for {env_id} in {BEHAVIOUR} (there: {shipped}): train one with "
            f"`python collect.py --env-id {env_id}`, or give recorded data with --dataset."
        )
    with np.load(path, allow_pickle=False) as stored:
        stacks = {k: stored[k] for k in stored if k not in ("snapshot_steps", "curve")}
    hidden = stacks["net.0.weight"].shape[1]
    actors = [Player(spec, hidden) for _ in stacks["net.0.weight"]]
    for k, actor in enumerate(actors):
        actor.load_state_dict({name: torch.tensor(x[k]).float() for name, x in stacks.items()})
    return actors


def players(actors: list[Player], quality: Quality) -> list[Player]:
    """Who plays which part of a dataset of this quality, in equal parts."""
    *replay, medium, expert = actors
    parts = {
        "medium": [medium],
        "medium-replay": [*replay, medium],
        "expert": [expert],
        "mixed": [medium, expert],
    }
    return parts[quality]


def record(env_id: str, quality: Quality, episodes: int, seed: int, path: Path) -> None:
    """Play `episodes` episodes and write them to `path` in the public episode layout."""
    spec = envs.make(env_id).spec
    cast = players(load_behaviour(env_id, spec), quality)
    share = -(-episodes // len(cast))  # episodes of each player
    env = envs.make(env_id, num_envs=min(share, 200))
    rounds = -(-share // env.num_envs)  # whole rounds are played, the surplus is dropped
    generator, parts = torch.Generator().manual_seed(seed), []
    with tqdm(total=len(cast) * rounds, desc=f"recording {env_id} {quality}", unit="round") as bar:
        for k, actor in enumerate(cast):
            played = []
            for i in range(rounds):
                start = 10**9 + seed * 10**5 + k * rounds + i  # battles that nobody trained on
                played.append(play(env, actor, generator, start))
                bar.update()
            joined = datasets.join_rounds(played, spec.episode_limit)
            parts.append({key: x[:share] for key, x in joined.items()})
    arrays = {key: np.concatenate([part[key] for part in parts])[:episodes] for key in parts[0]}
    about = {"env_id": env_id, "backend": spec.backend, "quality": quality, "seed": seed}
    datasets.save_episodes(path, arrays, about)


def cached(env_id: str, quality: Quality, episodes: int, seed: int) -> Path:
    """Where the recording with these arguments, by the policies shipped now, is kept."""
    shipped = BEHAVIOUR / f"{env_id}.npz"
    players = hashlib.sha256(shipped.read_bytes()).hexdigest()[:8] if shipped.exists() else "none"
    return CACHE / f"{env_id}-{quality}-{episodes}ep-seed{seed}-{players}.h5"


def load_or_record(env_id: str, quality: Quality, episodes: int, seed: int) -> Path:
    """Path of the cached dataset; recorded now if it is not there yet."""
    path = cached(env_id, quality, episodes, seed)
    if not path.exists():
        record(env_id, quality, episodes, seed, path)
    return path


def list_cells(seed: int) -> str:
    """A markdown table of the paper's datasets, each with its default number of episodes."""
    lines = ["| task | quality | episodes | transitions | return (mean ± std over episodes) | won "
             "| content hash |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for env_id in envs.PAPER_SMAC + envs.PAPER_MUJOCO:
        for quality in get_args(Quality):
            path = load_or_record(env_id, quality, defaults(env_id).episodes, seed)
            about = datasets.attributes(path)
            won = f"{about['win_rate']:.0%}" if "win_rate" in about else ""
            lines.append(
                f"| {env_id} | {quality} | {about['episodes']} | {about['transitions']:,} | "
                f"{about['return_mean']:.2f} ± {about['return_std']:.2f} | {won} "
                f"| `{about['content_sha256'][:12]}` |"
            )
    return "\n".join(lines)


def save_behaviour(path: Path, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    datasets.write_atomic(path, buffer.getvalue())


def main(args: Args) -> None:
    started = time.time()
    if args.list:
        print(list_cells(args.seed))
        return
    if args.record:
        path = args.out or cached(args.env_id, args.record, args.episodes, args.seed)
        record(args.env_id, args.record, args.episodes, args.seed, path)
        print(datasets.describe(path))
    else:
        path = args.out or BEHAVIOUR / f"{args.env_id}.npz"
        arrays = train_behaviour(args)
        save_behaviour(path, arrays)
        last = arrays["curve"][-10:].mean(0)
        print(f"return {last[1]:.2f}, won {last[2]:.0%} over the last 10 iterations")
    print(f"wrote {path} in {time.time() - started:.0f} s")


def defaults(env_id: str) -> Args:
    """The flags' defaults for a task: what its shipped policy was trained with."""
    return Args(env_id, **RECIPES.get(env_id, ROBOT if envs.is_robot(env_id) else {}))


def task_of(argv: list[str] | None, otherwise: str) -> str:
    """The --env-id of a command line, on which the other flags' defaults depend."""
    task = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    task.add_argument("--env-id", "--env_id", default=otherwise)
    return task.parse_known_args(argv)[0].env_id


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__, default=defaults(task_of(None, Args.env_id))))
    except (ValueError, OSError, ImportError) as e:
        sys.exit(f"collect.py: {e}")
