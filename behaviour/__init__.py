"""Behaviour policies, trained online with MAPPO, and the offline datasets recorded with them.

policy.py    the policies' networks, and playing whole episodes with them
mappo.py     their training
weights.py   the snapshots kept of a training: behaviour/ENV_ID.npz, shipped for the paper's tasks
record.py    datasets of four qualities, recorded with the shipped snapshots and cached in data/

python -m behaviour record --env-id 3s_vs_5z --quality medium    record a dataset
python -m behaviour list                                         the paper's 32 datasets
python -m behaviour train --env-id 3m                            train a policy for another task
"""

from behaviour.record import Quality, default_episodes, load_or_record

__all__ = ["Quality", "default_episodes", "load_or_record"]
