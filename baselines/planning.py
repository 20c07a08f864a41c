"""Planning with LOGO's model: MACQL+MPC [the paper's Sec. 5.2 and Table 4].

  propose   joint actions at a recorded state: the policy's greedy one, and others drawn from it
  look on   LOGO rolls each out over H steps; the greedy policy chooses what follows
  choose    a_max = the one with the largest  sum_t gamma^t r_t + gamma^H min_k Q_k(s_H, pi)
  imitate   L_MPC = L_policy + E[|pi_i(o^i) - a_max^i|^2]

LOGO's model serves to find a_max alone: critic, value and cloning see recorded rows only, as in
MACQL; each policy is drawn towards the action that its own critic prefers H steps later.

Readings, because the paper says no more than "the optimal action selected through model rollout
from three candidate actions proposed by the policy network": candidates are joint actions, with the
random actions of a rollout (D16) in all but the greedy one; imitation has weight 1, as the paper
prints it, which is ten times cloning's on maps (D17) and three times on HalfCheetah (D21); a
rollout that has not ended is worth the critic's value of its last state [as TD-MPC]; a_max is
sought for --rollout-batch-size recorded states every --rollout-interval updates, because a search
at every update took most of a run's time; discrete actions are imitated as Eq. (12) clones them;
planning serves training, and nobody plans in play.

`train.main` makes and trains LOGO only where batches have imagined rows. They are left out here,
which leaves B real rows, as in MACQL, and planning begins with the first of them.

Sizes: B batch, M planned states, C candidates, N agents, A action, H horizon.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F

import train
from baselines import run
from buffer import Batch
from logo_wm import LogoWM
from macql import MACQL, Actor, Critic, action_distance


@dataclass
class Args(train.Args):
    """MACQL, with policies drawn towards the best of several actions by LOGO's model."""

    NO_EFFECT: ClassVar = ("synthetic_fraction", "imagined_rows", "recorded_critic", "horizon",
                           "uncertainty", "cap", "u_scale")  # fmt: skip

    candidates: int = 3
    """C, joint actions that are compared [Sec. 5.2]"""
    planning_horizon: int = 5
    """H, steps that the model looks ahead [ours]"""
    mpc_weight: float = 1.0
    """weight of |pi - a_max|^2 in L_MPC [Sec. 5.2]"""


@torch.no_grad()
def best_action(
    model: LogoWM, learner: MACQL, starts: Batch, candidates: int, horizon: int, gamma: float,
    epsilon: float, generator: torch.Generator,
) -> torch.Tensor:  # fmt: skip
    """a_max (B,N,A): of several joint actions the one with the largest imagined return.

    Args:
        learner: its `actor` proposes and goes on, its `critic_target` values the last state.
        starts: recorded states, of which o, s and avail are used.
        epsilon: share of random actions (or noise) in all candidates but the greedy one.
    """
    actor, size = learner.actor, len(starts.reward)

    def repeated(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.repeat(candidates, *[1] * (x.ndim - 1))

    many = Batch(*map(repeated, starts))  # (C*B,...)
    proposed = actor.sample(many.obs, many.avail, generator, epsilon)
    proposed[:size] = actor.greedy(starts.obs, starts.avail)
    first = iter([proposed])

    def policy(obs, avail, generator):
        actions = next(first, None)
        return actor.greedy(obs, avail) if actions is None else actions

    rollout = model.imagine(policy, many, horizon, generator)
    returns = imagined_return(rollout, learner.critic_target, actor, gamma)
    best = returns.view(candidates, size).argmax(0)  # (B,)
    return proposed.unflatten(0, (candidates, size))[best, torch.arange(size, device=best.device)]


def imagined_return(rollout: dict, critic: Critic, actor: Actor, gamma: float) -> torch.Tensor:
    """sum_t gamma^t r_t + gamma^H min_k Q_k(s_H, pi(o_H)) of every rollout (B,).

    Args:
        rollout: of `LogoWM.imagine`; steps after its end do not count.
    """
    valid, horizon = rollout["valid"], len(rollout["valid"])  # (H,B)
    discounts = gamma ** torch.arange(horizon, device=valid.device).unsqueeze(-1)
    rewards = (discounts * rollout["reward"] * valid).sum(0)
    obs, state = rollout["obs"][-1], rollout["state"][-1]
    avail = rollout["avail"][-1] if "avail" in rollout else None
    value = critic(obs, state, actor.greedy(obs, avail)).amin(0)
    goes_on = valid[-1] * (1 - rollout["terminated"][-1])
    return rewards + gamma**horizon * goes_on * value


def mpc_loss(
    actor: Actor, critic: Critic, batch: Batch, is_real, *, policy_loss, obs, avail, best, weight
):  # fmt: skip
    """L_MPC = L_policy + weight * E[|pi_i(o^i) - a_max^i|^2].

    Args:
        policy_loss: L_policy, `MACQL.policy_loss`.
        obs (B,N,O), avail (B,N,A): planned states. best (B,N,A): their a_max.
    """
    loss, parts = policy_loss(actor, critic, batch, is_real)
    pi = actor(obs, avail)  # (B,N,A)
    distance = action_distance(pi, best, actor.discrete)
    assert distance.shape == best.shape[:1]
    return loss + weight * distance.mean(), parts | {"mpc": distance.mean().detach()}


class Planning:
    """MACQL on the real rows of a batch, and a_max at other recorded states.

    Args:
        learner: MACQL; its policies' loss gets one more term.
        draw: (generator) -> a `Batch` of M recorded states. plan: `best_action` but for model,
            learner, starts and generator.
        size: B, recorded rows in a batch. interval: updates between two searches. weight: of the
            imitation; 1 in the paper.
    `model` is the world model, set when it is made.
    """

    compilable = ("critic_loss",)

    def __init__(self, learner: MACQL, draw, plan, size: int, interval: int, weight: float):
        self.learner, self.draw, self.plan, self.model = learner, draw, plan, None
        self.size = size
        self.interval, self.weight, self.updates = interval, weight, 0
        self.actor, self.ema_actor, self.critic = learner.actor, learner.ema_actor, learner.critic
        self.critic_loss, self.policy_loss = learner.critic_loss, learner.policy_loss
        self.parts = learner.parts
        some = draw(torch.Generator(learner.actor.agent_id.device))  # for the shapes
        agree = torch.zeros_like(some.reward[0])
        self.planned = {"obs": some.obs, "best": some.actions, "agree": agree}
        self.planned |= {} if some.avail is None else {"avail": some.avail}

    def search(self, generator: torch.Generator) -> None:
        """Find a_max for other recorded states."""
        starts = self.draw(generator)
        best = self.plan(self.model, self.learner, starts, generator=generator)
        greedy = self.actor.greedy(starts.obs, starts.avail)
        agree = (greedy - best).abs().flatten(1).amax(1) == 0
        for name, x in (("obs", starts.obs), ("avail", starts.avail), ("best", best)):
            if x is not None:
                self.planned[name] = x
        self.planned["agree"] = agree.float().mean()

    def update(self, batch: Batch, is_real, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """One gradient step on the critic, then one on the policies, towards a_max too."""
        real = Batch(*(None if x is None else x[: self.size] for x in batch))  # they come first
        self.learner.policy_loss = self.policy_loss
        self.learner.critic_loss = self.critic_loss  # the compiled one, with --compile
        metrics = {"pi_mpc": torch.zeros_like(real.reward[0])}  # until planning begins
        if len(batch.reward) > self.size:  # imagination has begun, so LOGO is trained
            if self.updates % self.interval == 0:
                self.search(generator)
            self.updates += 1
            states = self.planned
            pick = torch.randint(len(states["best"]), (self.size,), generator=generator,
                                 device=real.reward.device)  # fmt: skip
            self.learner.policy_loss = partial(
                mpc_loss, policy_loss=self.policy_loss, obs=states["obs"][pick],
                avail=states["avail"][pick] if "avail" in states else None,
                best=states["best"][pick], weight=self.weight,
            )  # fmt: skip
        metrics["greedy_is_best"] = self.planned["agree"]
        return metrics | self.learner.update(real, torch.ones_like(real.reward), generator)

    def state_dict(self) -> dict:
        return self.learner.state_dict() | {"planned": self.planned, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.learner.load_state_dict(state)
        self.planned, self.updates = state["planned"], state["updates"]


def builders() -> dict:
    """`learner` and `world_model` for `train.main`, which makes the learner first."""
    made = []

    def learner(args: Args, spec, data) -> Planning:
        plan = partial(
            best_action, candidates=args.candidates, horizon=args.planning_horizon,
            gamma=args.gamma, epsilon=train.exploration(args, spec),
        )  # fmt: skip
        macql = train.make_learner(args, spec, data)
        draw = partial(data.sample, args.rollout_batch_size)
        often = args.batch_size, args.rollout_interval
        made[:] = [Planning(macql, draw, plan, *often, args.mpc_weight)]
        return made[0]

    def world_model(args: Args, spec, data) -> LogoWM:
        made[0].model = train.make_world_model(args, spec, data)
        return made[0].model

    return {"learner": learner, "world_model": world_model}


def _self_check():
    """One agent, one step, two actions: the data pay for neither, the model for the second one.

    Imitating a_max must turn the policy to it.
    """
    from types import SimpleNamespace

    torch.manual_seed(0)
    size, g = 256, torch.Generator().manual_seed(0)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    actor = Actor(zero, one, 2, hidden=32)
    learner = MACQL(actor, Critic(zero, one, zero[0], one[0], 2, hidden=32), lr=3e-3, bc_lambda=0.0)

    def imagine(policy, starts, horizon, generator):  # action 1 pays, and the episode ends
        actions = policy(starts.obs, starts.avail, generator)
        both = {k: torch.stack([getattr(starts, k)] * 2) for k in ("obs", "state", "avail")}
        ones = torch.ones(1, len(actions))
        return both | {"reward": actions[:, 0, 1][None], "valid": ones, "terminated": ones}

    plan = partial(best_action, candidates=3, horizon=1, gamma=0.99, epsilon=0.5)
    obs, state, avail = torch.zeros(size, 1, 1), torch.zeros(size, 1), torch.ones(size, 1, 2)
    taken = F.one_hot(torch.randint(2, (size, 1), generator=g), 2).float()
    ones = torch.ones(size)
    batch = Batch(obs, state, taken, avail, torch.zeros(size), obs, state, avail, ones, ones)
    planning = Planning(learner, lambda generator: batch, plan, size // 2, interval=10, weight=1.0)
    planning.model = SimpleNamespace(imagine=imagine)
    is_real = torch.cat([torch.ones(size // 2), torch.zeros(size // 2)])
    for k in range(101):
        metrics = planning.update(batch, is_real, g)
        if k % 50 == 0:
            p = actor(obs[:1], avail[:1])[0, 0, 1].item()
            print(f"update {k:3}: probability of the better action {p:.3f}, "
                  f"|pi - a_max|^2 {metrics['pi_mpc']:.3f}")  # fmt: skip
    assert p > 0.9, "the policy must follow a_max"


if __name__ == "__main__":
    run("planning", Args, _self_check, **builders())
