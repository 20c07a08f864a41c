"""Recording offline datasets with the shipped behaviour policies, reproducibly from a seed.

The four qualities of the public benchmarks [CFCQL, OMIGA; docs/data.md]:

  medium         episodes of the snapshot that wins half as often as the expert
                 (robots: whose return comes nearest to the public medium data's)
  medium-replay  episodes of five snapshots spread evenly up to medium, in equal parts
  expert         episodes of the final policy
  mixed          medium and expert, in equal parts

Recordings are not shipped: each is made at its first use and cached in data/.
"""

import hashlib
from pathlib import Path
from typing import Literal, get_args

import h5py
import numpy as np
import torch
from tqdm import tqdm

import datasets
import envs
from behaviour import weights
from behaviour.policy import Policy, play

Quality = Literal["medium", "medium-replay", "expert", "mixed"]
CACHE = Path(__file__).parents[1] / "data"


def default_episodes(env_id: str) -> int:
    """Episodes of a dataset; a robot's are up to 1000 steps long, so that fewer will do."""
    return 200 if envs.is_robot(env_id) else 600


def policies_of(quality: Quality, policies: list[Policy]) -> list[Policy]:
    """Those of a task's six policies whose episodes make up a dataset of this quality."""
    *replay, medium, expert = policies
    parts = {
        "medium": [medium],
        "medium-replay": [*replay, medium],
        "expert": [expert],
        "mixed": [medium, expert],
    }
    return parts[quality]


def slots(policies: int, episodes: int) -> int:
    """Episodes that are played side by side."""
    return min(-(-episodes // policies), 200)


def starts(policies: int, episodes: int, seed: int) -> np.ndarray:
    """Seeds of the rounds of episodes, (policies, rounds); whole rounds are played, and of each
    policy's last round the surplus is dropped. No training used these seeds."""
    share = -(-episodes // policies)  # of the first policies, if the parts are not equal
    rounds = -(-share // slots(policies, episodes))
    return 10**9 + seed * 10**5 + np.arange(policies * rounds).reshape(policies, rounds)


def record(env_id: str, quality: Quality, episodes: int, seed: int, path: Path) -> None:
    """Play `episodes` episodes with the shipped policies and write them in the public layout.

    Raises:
        ValueError: unknown task, negative seed, or fewer episodes than policies that take part.
        FileNotFoundError: no behaviour policy is shipped for this task.
        ImportError: the task's simulator is not installed.
        OSError: `path` cannot be written; nothing is left behind.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed is {seed}: give 0 to {2**32 - 1:,}.")
    if envs.natural_backend(env_id) == "smacv2":
        raise ValueError(f"{env_id}: recordings are made in SMAX and MuJoCo only.")
    spec = envs.make(env_id, hide=False).spec  # these policies see all that SMAX shows
    policies = policies_of(quality, weights.load_policies(env_id, spec))
    if episodes < len(policies):
        raise ValueError(
            f"--episodes is {episodes}, but {quality} has episodes of {len(policies)} policies: "
            f"give {len(policies)} or more."
        )
    datasets.check_writable(path)
    env = envs.make(env_id, num_envs=slots(len(policies), episodes), hide=False)
    rounds = starts(len(policies), episodes, seed)  # of each policy, equally many
    generator, parts = torch.Generator().manual_seed(seed), []
    label = f"recording {env_id} {quality}"
    with tqdm(total=rounds.size, desc=label, unit="round") as bar:
        for k, policy in enumerate(policies):
            logs = []
            for start in rounds[k].tolist():
                logs.append(play(env, policy, generator, start))
                bar.update()
            joined = datasets.join_rounds(logs, spec.episode_limit)
            wanted = episodes // len(policies) + (k < episodes % len(policies))
            parts.append({key: x[:wanted] for key, x in joined.items()})
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    if spec.discrete:  # the data show what an agent of `envs.make(env_id)` sees
        arrays["obs"] = arrays["obs"][..., envs.make(env_id).columns]
    else:  # and no action where an agent has fewer motors than another
        arrays["actions"] = env.partition.split(env.partition.join(arrays["actions"]))
    metadata = {"env_id": env_id, "backend": spec.backend, "quality": quality, "seed": seed}
    datasets.save_episodes(path, arrays, metadata)


def cached(env_id: str, quality: Quality, episodes: int, seed: int) -> Path:
    """Where a recording is cached; the name changes with the arguments, the shipped weights and
    what is hidden of SMAX's observations."""
    shipped, digest = weights.FOLDER / f"{env_id}.npz", "none"
    if shipped.exists():
        source = shipped.read_bytes() + " ".join(envs.HIDDEN).encode()
        digest = hashlib.sha256(source).hexdigest()[:8]
    return CACHE / f"{env_id}-{quality}-{episodes}ep-seed{seed}-{digest}.h5"


def load_or_record(env_id: str, quality: Quality, episodes: int, seed: int = 0) -> Path:
    """Path of the cached dataset, which is recorded now if it is not there yet.

    Raises:
        ValueError, FileNotFoundError, ImportError, OSError: as `record`.
    """
    path = cached(env_id, quality, episodes, seed)
    if not path.exists():
        record(env_id, quality, episodes, seed, path)
    return path


def table(seed: int) -> str:
    """The paper's 32 datasets as a markdown table, each with its default number of episodes.

    Raises:
        ValueError, FileNotFoundError, ImportError, OSError: as `record`.
    """
    lines = ["| task | quality | episodes | transitions | return (mean ± std over episodes) | won "
             "| content hash |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for env_id in envs.PAPER_SMAC + envs.PAPER_MUJOCO:
        for quality in get_args(Quality):
            path = load_or_record(env_id, quality, default_episodes(env_id), seed)
            with h5py.File(path, "r") as f:
                metadata = dict(f.attrs)
            won = f"{metadata['win_rate']:.0%}" if "win_rate" in metadata else ""
            lines.append(
                f"| {env_id} | {quality} | {metadata['episodes']} | {metadata['transitions']:,} | "
                f"{metadata['return_mean']:.2f} ± {metadata['return_std']:.2f} | {won} "
                f"| `{metadata['content_sha256'][:12]}` |"
            )
    return "\n".join(lines)
