"""Which robot a recording is of, and how its state and motors are divided among agents."""

from pathlib import Path

from envs import MUJOCO_ROBOTS
from simulators.mamujoco import MamujocoEnv


def find_robot(path: Path, env_id: str | None, found: str | None) -> MamujocoEnv:
    """The robot of a recording, divided as `env_id` says, or else as `found` in the file says.

    It is closed: its spec, partition and strength are what a reader needs.

    Raises:
        ValueError: neither is given, env_id names another robot than the file, or
            gymnasium-robotics has no such partition.
        ImportError: gymnasium-robotics or MuJoCo is not installed.
    """
    name = env_id or found
    if name is None:
        raise ValueError(f"{path}: does not say how its robot is divided: give --env-id.")
    body = name.partition("-")[0]
    if body not in MUJOCO_ROBOTS or (found and body != found.partition("-")[0]):
        raise ValueError(f"{path}: is of {found or 'a robot'}, not of {name}.")
    env = MamujocoEnv(name, num_envs=1, seed=0)
    env.close()
    return env
