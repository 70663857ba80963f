"""Recover the latent and the initial noise of one picture and write both to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ringmark.data.files import write_atomic
from ringmark.data.images import read_samples, to_array
from ringmark.inversion.recover import Recovered, Recoverer
from ringmark.inversion.sizes import candidate_sizes

__all__ = ["invert_file"]


def invert_file(recoverer: Recoverer, path: Path, output: Path) -> dict[str, Any]:
    """Write `latents` and `noise` (C, h, w) to a file, with a record of the inversion, and return the record.

    The picture is read at the likeliest of its `candidate_sizes`.

    The noise of a marked image is a rough copy of the key, so only the owner can read the file. Raises ImageError for a
    picture that cannot be read and OSError for a file that cannot be written.
    """
    from safetensors.torch import save

    sample = read_samples(path, lambda size: candidate_sizes(size, recoverer.model)[:1])[0]
    recovered = recoverer(torch.from_numpy(to_array(sample.image))[None])
    facts = {"image": str(path), **_progress(recovered), "notes": list(sample.notes)}
    record = facts | recoverer.settings_at((sample.image.height, sample.image.width)).as_dict()
    tensors = {"latents": recovered.solution.value[0].cpu().contiguous(), "noise": recovered.noise[0].contiguous()}
    write_atomic(output, save(tensors, {"ringmark": json.dumps(record)}), 0o600)
    return record


def _progress(recovered: Recovered) -> dict[str, Any]:
    """Status and residuals of the solver for the single image of a batch."""
    solution = recovered.solution
    inverted = len(solution.residuals) > 0
    return {
        "status": solution.status[0].value,
        "evaluations": int(solution.steps[0]),
        "residual": float(solution.at_value(solution.residuals)[0]) if inverted else None,
        "residuals": solution.residuals[:, 0].tolist(),
        "pixel_residuals": solution.merits[:, 0].tolist(),
        "seconds": recovered.seconds,
    }
