"""MAPPO, by which the behaviour policies are trained online [Yu et al., 2022].

The agents' policies are one network (`Player`), a critic sees the global state, and PPO's clipped
objective improves both on whole episodes. Offline learning needs none of this: it is how somebody
came to play the recorded episodes; collect.py says who plays what.

Sizes: T steps, E parallel episodes, N agents, O observation, S state, A actions, R rows.
"""

import math

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import envs

# --------------------------------------------------------------------------------------------------
# Acting
# --------------------------------------------------------------------------------------------------


class Player(nn.Module):
    """The agents' behaviour policies pi_i(a|o^i), one network.

    Discrete: every agent is alike, logits of a masked softmax. Continuous: the agents drive
    different joints, so each is told its number; Gaussian with one learned spread per motor.

    Args:
        spec: of the environment. hidden: width of the two hidden layers.
        units: logits by a `UnitNet` (SMAX only), else by a plain network.
    """

    def __init__(self, spec: envs.Spec, hidden: int, units: bool = False):
        super().__init__()
        n, o, a = spec.num_agents, spec.obs_dim, spec.action_dim
        self.discrete = spec.discrete
        inputs = o if spec.discrete else o + n
        self.net = UnitNet(n, o, a, hidden) if units else mlp(inputs, hidden, a)
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


class UnitNet(nn.Module):
    """Logits from SMAX's observation unit by unit: what is learnt of one enemy holds for all.

    SMAX shows an agent every other unit as a block of F features, allies first, then itself as
    F - 3; action 5 + k attacks enemy k. [The idea: Wang et al., 2020, Action Semantics Networks.]

    Args:
        n, o, a: numbers of agents, observations and actions. hidden: width of every layer.
    """

    def __init__(self, n: int, o: int, a: int, hidden: int):
        super().__init__()
        self.allies, self.enemies = n - 1, a - 5
        self.features = (o + 3) // (n + self.enemies)  # F
        self.ally, self.enemy = nn.Linear(self.features, hidden), nn.Linear(self.features, hidden)
        self.own = nn.Linear(self.features - 3, hidden)
        self.context = nn.Sequential(
            nn.Linear(3 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.move = nn.Linear(hidden, 5)
        self.attack = nn.Linear(hidden, hidden + 1)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """(...,O) -> (...,A)"""
        blocks = [self.allies * self.features, self.enemies * self.features, self.features - 3]
        allies, enemies, own = obs.split(blocks, -1)
        allies = allies.unflatten(-1, (self.allies, -1))  # (...,N-1,F)
        enemies = enemies.unflatten(-1, (self.enemies, -1))
        a = self.ally(allies).relu() * (allies[..., :1] > 0)  # health 0: not seen, or dead
        e = self.enemy(enemies).relu() * (enemies[..., :1] > 0)
        c = self.context(torch.cat([self.own(own).relu(), a.sum(-2), e.sum(-2)], -1))
        query, bias = self.attack(c).split([c.shape[-1], 1], -1)
        attack = (e @ query.unsqueeze(-1)).squeeze(-1) / c.shape[-1] ** 0.5 + bias
        return torch.cat([self.move(c), attack], -1)


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


def train_behaviour(args) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """From nothing to args.total_steps (collect.Args).

    Returns:
        curve (iterations,4): steps so far, mean return, share of battles won, share of enemies
        weakened; and after each iteration the player's state_dict in float16.
    """
    env = envs.make(args.env_id, args.num_envs)
    spec, torch_rng = env.spec, torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    player = Player(spec, args.hidden, args.units)
    critic = mlp(spec.state_dim, 2 * args.hidden, 1)
    if not args.units:
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
            of_state.add(log["state"][:-1][log["filled"].bool()])
            if not spec.discrete and not curve:
                of_obs.add(log["obs"][:-1][log["filled"].bool()])
            if not spec.discrete:
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
            weakened -= 0.01
        left = max(0.0, 1 - steps / (0.8 * args.total_steps))
        weakened = max(0.0, min(weakened, left * args.weakened))
    bar.close()
    return np.array(curve), snapshots


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
