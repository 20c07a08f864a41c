"""Behaviour policies, trained online, and the offline datasets recorded with them.

  python collect.py --env-id 3s_vs_5z                    retrain the behaviour policy from nothing
  python collect.py --env-id 3s_vs_5z --record medium    record a dataset with the shipped policy

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

import dataclasses
import hashlib
import io
import sys
import time
from pathlib import Path
from typing import Literal

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


@dataclasses.dataclass
class Args:
    """Train a behaviour policy, or record a dataset with a trained one."""

    env_id: str = "3s_vs_5z"
    """map to play"""
    record: Quality | None = None
    """record this dataset with the shipped policy instead of training one"""
    episodes: int = 600
    """episodes to record"""
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


# --------------------------------------------------------------------------------------------------
# Acting
# --------------------------------------------------------------------------------------------------


def actor_net(obs_dim: int, action_dim: int, hidden: int) -> nn.Sequential:
    """(..., O) -> (..., A) logits; the same weights for every agent."""
    return nn.Sequential(
        nn.Linear(obs_dim, hidden), nn.Tanh(),
        nn.Linear(hidden, hidden), nn.Tanh(),
        nn.Linear(hidden, action_dim),
    )  # fmt: skip


def log_policy(actor: nn.Module, obs: torch.Tensor, avail: torch.Tensor) -> torch.Tensor:
    """log pi(a|o) (..., A); forbidden actions have -inf."""
    return actor(obs).masked_fill(avail == 0, -torch.inf).log_softmax(-1)


def draw(log_pi: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One action each, as one-hot (..., A)."""
    flat = log_pi.flatten(0, -2).exp()
    choice = torch.multinomial(flat, 1, generator=generator)  # (rows,1)
    return torch.zeros_like(flat).scatter_(1, choice, 1.0).view_as(log_pi)


@torch.no_grad()
def play(env, actor: nn.Module, generator: torch.Generator, seed: int) -> dict[str, np.ndarray]:
    """One whole episode in each slot.

    Returns arrays obs (T+1,E,N,O), state (T+1,E,S), avail (T+1,E,N,A), actions (T,E,N,A),
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
        log_pi = log_policy(actor, torch.tensor(now.obs), torch.tensor(now.avail))
        actions = draw(log_pi, generator).numpy()
        filled, now = ~now.over, env.step(actions)
        step = (actions, now.reward, now.terminated, now.won, filled)
        for k, value in zip(keys[3:], step, strict=True):
            log[k].append(value)
    return {k: np.stack(v) for k, v in log.items()}


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


def train_behaviour(args: Args) -> dict[str, np.ndarray]:
    """MAPPO from nothing; returns the arrays that `save_behaviour` stores."""
    env = envs.make(args.env_id, args.num_envs)
    spec, torch_rng = env.spec, torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    actor = actor_net(spec.obs_dim, spec.action_dim, args.hidden)
    critic = actor_net(spec.state_dim, 1, 2 * args.hidden)
    nn.init.zeros_(actor[-1].weight)  # start uniform: early advantages are noise
    both = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(both, lr=args.lr, fused=True)
    steps, curve, snapshots, state_stats = 0, [], [], None
    bar = tqdm(total=args.total_steps, unit="step", unit_scale=True, desc=f"MAPPO {args.env_id}")
    while steps < args.total_steps:
        raw = play(env, actor, torch_rng, seed=args.seed * 10**6 + len(curve))
        log = {k: torch.as_tensor(v, dtype=torch.float32) for k, v in raw.items()}
        if state_stats is None:  # SMAX states mix map units with flags
            flat = log["state"].flatten(0, 1)
            state_stats = flat.mean(0), flat.std(0).clamp(min=1e-2)
        state = (log["state"] - state_stats[0]) / state_stats[1]  # (T+1,E,S)
        with torch.no_grad():
            value = critic(state).squeeze(-1)  # (T+1,E)
        reward = log["reward"] / 10  # returns near 1 keep the critic's gradients tame
        adv = advantages(
            reward, value, log["terminated"], log["filled"], args.gamma, args.gae_lambda
        )
        on = log["filled"].bool()
        rows = {
            "obs": log["obs"][:-1][on], "avail": log["avail"][:-1][on],
            "actions": log["actions"][on],
            "state": state[:-1][on], "target": (adv + value[:-1])[on],
            "adv": (adv[on] - adv[on].mean()) / (adv[on].std() + 1e-8),
        }  # fmt: skip
        with torch.no_grad():
            old = log_policy(actor, rows["obs"], rows["avail"])
            rows["old"] = (old.clamp(min=-1e9) * rows["actions"]).sum(-1)  # (R,N)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - steps / args.total_steps)
        ppo_epochs(args, actor, critic, optimizer, both, rows, torch_rng)
        steps += int(on.sum())
        curve.append((steps, raw["reward"].sum(0).mean(), raw["won"].any(0).mean()))
        snapshots.append([p.detach().half().numpy() for p in actor.parameters()])
        bar.update(int(on.sum()))
        bar.set_postfix({"return": f"{curve[-1][1]:.1f}", "won": f"{curve[-1][2]:.0%}"})
    bar.close()
    return select_snapshots(np.array(curve), snapshots)


def ppo_epochs(args, actor, critic, optimizer, parameters, rows, generator) -> None:
    """Several passes of PPO's clipped objective over one iteration's rows."""
    for _ in range(args.epochs):
        order = torch.randperm(len(rows["adv"]), generator=generator)
        for part in order.chunk(args.minibatches):
            b = {k: v[part] for k, v in rows.items()}
            log_pi = log_policy(actor, b["obs"], b["avail"]).clamp(min=-1e9)  # (R,N,A)
            ratio = ((log_pi * b["actions"]).sum(-1) - b["old"]).exp()  # (R,N)
            adv = b["adv"].unsqueeze(-1)
            gain = torch.minimum(ratio * adv, ratio.clamp(1 - args.clip, 1 + args.clip) * adv)
            entropy = -(log_pi.exp() * log_pi).sum(-1)
            error = critic(b["state"]).squeeze(-1) - b["target"]
            loss = 0.5 * error.square().mean() - gain.mean() - args.entropy * entropy.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()


def select_snapshots(curve: np.ndarray, snapshots: list, replay: int = 5) -> dict:
    """Keep `replay` snapshots spread up to medium, medium last, then the final one.

    Args:
        curve: (iterations,3) of environment steps, mean return, win rate of that iteration.
        snapshots: per iteration, the actor's parameters.
    """
    goal = curve[:, 2] if curve[-1, 2] > 0 else curve[:, 1]
    smooth = np.array([goal[max(0, i - 4) : i + 5].mean() for i in range(len(goal))])
    medium = int(np.abs(smooth - smooth[-1] / 2).argmin())
    kept = [round(medium * (k + 1) / replay) for k in range(replay)] + [len(curve) - 1]
    weights = {
        f"parameter_{j}": np.stack([snapshots[i][j] for i in kept])
        for j in range(len(snapshots[0]))
    }
    return {**weights, "snapshot_steps": curve[kept, 0], "curve": curve.astype(np.float32)}


# --------------------------------------------------------------------------------------------------
# Recording
# --------------------------------------------------------------------------------------------------


def load_behaviour(env_id: str, spec: envs.Spec) -> list[nn.Module]:
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
        stacks = [stored[k] for k in sorted(k for k in stored if k.startswith("parameter_"))]
    actors = []
    for k in range(len(stacks[0])):
        actor = actor_net(spec.obs_dim, spec.action_dim, hidden=len(stacks[1][k]))
        for p, stack in zip(actor.parameters(), stacks, strict=True):
            p.data.copy_(torch.from_numpy(stack[k].astype(np.float32)))
        actors.append(actor)
    return actors


def players(actors: list[nn.Module], quality: Quality) -> list[nn.Module]:
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


def save_behaviour(path: Path, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    datasets.write_atomic(path, buffer.getvalue())


def main(args: Args) -> None:
    started = time.time()
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


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (ValueError, OSError, ImportError) as e:
        sys.exit(f"collect.py: {e}")
