"""No update and no rollout reads a value: on a GPU a read waits for all computation before it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import envs
import train
from buffer import OfflineDataset, SyntheticBuffer, mix

N, OBS, S, A, EPISODES, STEPS = 2, 5, 4, 3, 6, 10
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default")
SETTINGS = {
    "default": {},
    "expectation": {"conservative": "expectation", "backup": "max"},
    "printed": {"imagined_rows": "printed", "clamp": False},
    "predicted": {"observe": "predicted", "u_scale": 0.2},
    "paper": train.PAPER,
}


class Reads(TorchDispatchMode):
    """Notes every operation whose result the processor must wait for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += [str(function) for name in READS if name in str(function)]
        if "aten.index." in str(function):  # by booleans it counts them first
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            self.seen += [str(function)] * len(masks)
        return function(*args, **(kwargs or {}))


def make_data(discrete: bool, device: str = "cpu") -> tuple[OfflineDataset, envs.Spec]:
    rows = EPISODES * (STEPS + 1)
    actions = torch.rand(rows, N, A) * 2 - 1
    if discrete:
        actions = torch.eye(A)[torch.randint(A, (rows, N))]
    avail = torch.ones(rows, N, A) if discrete else None
    obs, state, reward = (torch.randn(rows, *size) for size in ((N, OBS), (S,), ()))
    obs[::3, :, 0], state[::2, 1] = 0.0, 0.0  # columns that are often 0
    terminated = (torch.arange(rows) % (STEPS + 1) == STEPS - 1).float()
    columns = (obs, state, actions, avail, reward, terminated)
    columns = (None if x is None else x.to(device) for x in columns)
    data = OfflineDataset(*columns, [STEPS] * EPISODES)
    return data, envs.Spec("none", "offline", N, OBS, S, A, discrete, STEPS)


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_training_reads_no_value(setting, discrete, one_hot_as_on_a_gpu):
    data, spec = make_data(discrete)
    args = train.Args(hidden=8, updates=8, **SETTINGS[setting])
    world_model, learner = (
        make(args, spec, data) for make in (train.make_world_model, train.make_learner)
    )
    model_data = SyntheticBuffer(2, 3, 8, N, OBS, S, A, "cpu", discrete, u_scale=args.u_scale)
    rng = torch.Generator().manual_seed(0)
    with Reads() as reads:
        loss, metrics = world_model.loss(data.sample(8, rng))
        rollout = world_model.imagine(learner.actor.sample, data.sample(8, rng), 3, rng)
        model_data.add(rollout)
        batch, is_real = mix(data.sample(4, rng, 2, 0.9), model_data.sample(4, rng, 2, 0.9))
        metrics |= learner.update(batch, is_real, rng)
    assert reads.seen == []
    assert all(x.isfinite().all() for x in (*metrics.values(), *rollout.values()))


def test_the_check_itself_sees_a_read():
    with Reads() as reads:
        torch.ones(2).sum().item()
        x = torch.ones(2)
        x[x > 0], x[torch.tensor([1])]
    assert reads.seen == ["aten._local_scalar_dense.default", "aten.index.Tensor"]
