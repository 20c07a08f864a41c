"""What recorded episodes of any format hold: a summary, and a copy in the layout of episodes.py."""

from pathlib import Path

import h5py
import numpy as np

from datasets.episodes import Padded, save_episodes
from datasets.load import read_episodes

FORMATS = {
    "episodes": "episodes in HDF5 (pymarl, CFCQL, ODIS, our own)",
    "omiga": "OMIGA's HDF5",
    "vault": "OG-MARL Vault",
    "minari": "Minari",
}


def describe(path: Path, env_id: str | None = None) -> str:
    """A summary in a few lines: sizes, returns, repairs and hashes.

    Args and errors: as in `load.load_dataset`.
    """
    columns, lengths, metadata = read_episodes(path, env_id)
    (_, n, o), s, a = columns["obs"].shape, columns["state"].shape[1], columns["actions"].shape[-1]
    won = ""
    if "win_rate" in metadata:
        won = f", {100 * metadata['win_rate']:.0f} % of episodes won"
        won += " (inferred from the rewards)" if metadata.get("win_rate_inferred") else ""
    kind = "actions" if columns["avail"] is not None else "motors each"
    ended = int(columns["terminated"].sum())
    lines = [
        f"{path}",
        f"  {FORMATS[metadata['format']]}, task {metadata.get('env_id', 'not stored')}",
        f"  {n} agents, {a} {kind}, observations {o}, state {s}",
        f"  {metadata['episodes']} episodes, {metadata['transitions']:,} transitions, "
        f"return {metadata['return_mean']:.2f} +- {metadata['return_std']:.2f}{won}",
        f"  {ended} episodes terminated, {len(lengths) - ended} were truncated; "
        f"final observations are {metadata['final_observation']}",
        *(f"  repaired: {sentence}" for sentence in metadata["repaired"]),
        f"  sha256 {metadata['sha256']}",
        f"  sha256 of the content {metadata.get('content_sha256', 'not stored')}",
    ]
    return "\n".join(lines)


def convert(path: Path, out: Path, env_id: str | None = None) -> None:
    """Write the episodes of `path`, in any format, to the file `out` in the layout of episodes.py.

    Args and errors: as in `load.load_dataset`; OSError if `out` cannot be written.
    """
    if out.exists() and (out.samefile(path) or not h5py.is_hdf5(out)):
        raise ValueError(f"{out} exists, and is the source or no dataset: name another file.")
    columns, lengths, metadata = read_episodes(path, env_id)
    if "env_id" not in metadata:
        raise ValueError(f"{path} does not say its task: give --env-id.")
    discrete = columns["avail"] is not None
    valid = np.ones((len(columns["reward"]), 1))

    def padded(rows, dtype, change=lambda x: x):
        return Padded(rows, lengths, dtype, change)

    arrays = {k: padded(columns[k], np.float32) for k in ("state", "obs", "actions")}
    arrays["reward"] = padded(columns["reward"][:, None], np.float32)
    arrays["terminated"] = padded(columns["terminated"][:, None], np.uint8)
    arrays["filled"] = padded(valid, np.int64)
    if discrete:
        arrays["avail_actions"] = padded(columns["avail"], np.int32)
        arrays["actions"] = padded(columns["actions"], np.int64, lambda x: x.argmax(-1)[..., None])
    if "won" in columns:
        arrays["won"] = columns["won"].astype(np.uint8)
    dropped = ("path", "sha256", "format", "content_sha256", "win_rate")
    about = {k: v for k, v in metadata.items() if k not in dropped}
    about["repaired"] = "\n".join(metadata["repaired"])
    about["converted_from"], about["converted_sha256"] = metadata["format"], metadata["sha256"]
    save_episodes(out, arrays, about)
