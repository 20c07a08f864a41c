"""The dynamics model that LOGO's is timed against: an ensemble that predicts joint observations.

The paper's Table 5 compares with seven probabilistic networks. `load_kit` takes them as
OfflineRL-Kit publishes them. `Ensemble` is the same computation in tensors, as LOGO is written,
without numpy, with all members in one batched product or one after the other; its networks are
those of baselines/ensemble.py.

Sizes: B rows side by side, M members.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn as nn

from baselines.ensemble import Members


class Ensemble(nn.Module):
    """M probabilistic networks (joint o, joint a) -> N(joint o_next - o, r), as in OfflineRL-Kit.

    Args:
        obs, actions: dimensions of the joint observation and of the joint action.
        hidden: width of the four hidden layers; OfflineRL-Kit has 200.
        looped: one member after the other, instead of all in one batched product.
    """

    def __init__(self, obs: int, actions: int, hidden=200, members=7, elites=5, looped=False):
        super().__init__()
        self.net = Members(obs + actions, obs + 1, 0, hidden, members, looped)
        self.elites = elites

    @torch.no_grad()
    def step(self, obs: torch.Tensor, actions: torch.Tensor) -> dict[str, torch.Tensor]:
        """One imagined step (B,...), sampled from a random elite member per row.

        The penalty on the reward is the largest standard deviation among all members.
        """
        mean, log_var = self.net(torch.cat([obs, actions], -1))  # (M,B,obs+1)
        std = torch.exp(0.5 * log_var)
        penalty = std.norm(dim=-1).amax(0)  # (B,)
        rows = torch.arange(len(obs), device=obs.device)
        member = torch.randint(self.elites, (len(obs),), device=obs.device)
        change = torch.addcmul(mean[member, rows], std[member, rows], torch.randn_like(mean[0]))
        reward = change[:, -1]
        return {
            "next_obs": obs + change[:, :-1],
            "raw_reward": reward,
            "reward": reward - penalty,
            "penalty": penalty,
        }

    def rollout(self, obs: torch.Tensor, actions: torch.Tensor) -> dict[str, torch.Tensor]:
        """H steps from obs (B,obs) with actions (H,B,actions); returns the last step's outcome."""
        for chosen in actions:
            out = self.step(obs, chosen)
            obs = out["next_obs"]
        return out


def load_kit(checkout: Path) -> tuple[Callable, str]:
    """(obs, actions, hidden, device) -> OfflineRL-Kit's EnsembleDynamics; and the code's commit.

    Raises:
        ImportError: there is no checkout.
    """
    if not (checkout / "offlinerlkit").is_dir():
        raise ImportError(
            f"--offlinerl-kit {checkout}: no checkout of OfflineRL-Kit; docs/speed.md says how to "
            "get one."
        )
    # the package imports this module, which needs gym and mujoco_py, and is not used here
    oracle = ModuleType("offlinerlkit.dynamics.mujoco_oracle_dynamics")
    oracle.MujocoOracleDynamics = None
    sys.modules.setdefault(oracle.__name__, oracle)
    sys.path.insert(0, str(checkout))
    from offlinerlkit.dynamics import EnsembleDynamics
    from offlinerlkit.modules import EnsembleDynamicsModel
    from offlinerlkit.utils.scaler import StandardScaler

    def never_done(obs: np.ndarray, *_) -> np.ndarray:
        return np.zeros((len(obs), 1), bool)

    def make(obs: int, actions: int, hidden: int, device: torch.device):
        decays = [0.0] * 5  # of each layer's weights, for training
        model = EnsembleDynamicsModel(
            obs, actions, [hidden] * 4, weight_decays=decays, device=device
        )
        scaler = StandardScaler(*np.float32([[[0]], [[1]]]))
        return EnsembleDynamics(model, None, scaler, never_done, penalty_coef=1.0)

    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return make, done.stdout.strip() or "of unknown commit"
