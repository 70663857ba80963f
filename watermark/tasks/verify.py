"""Single images: verify, explain, invert; and facts about a model."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from ringmark.data.files import one_line, write_atomic
from ringmark.data.images import Sample, read_sample, to_array
from ringmark.errors import ImageError, StoreError
from ringmark.inversion.models.pipeline import LatentModel
from ringmark.inversion.recover import Recoverer
from ringmark.watermark.detect.verifier import Verifier
from ringmark.watermark.figures import explain, save_figure
from ringmark.watermark.schemes.fourier import recommend

__all__ = ["Line", "facts", "invert_file", "verify_files"]


@dataclass(frozen=True)
class Line:
    """What is said of one file: a sentence, a record, and the exit code that it alone would give."""

    text: str
    record: dict
    exit_code: int

    @property
    def unreadable(self) -> bool:
        return "error" in self.record


def verify_files(
    verifier: Verifier, paths: list[Path], *, batch: int = 8, explain_to: Path | None = None
) -> list[Line]:
    """A line for each file, in the order given; with several keys, it names all that fit, its record is of the best.

    What the first readable image's verdict rests on is drawn into `explain_to`. Raises StoreError where that is an image.
    """
    if explain_to and explain_to.resolve() in {path.resolve() for path in paths}:
        raise StoreError(f"{one_line(explain_to)}: is one of the images; name another file for --explain")
    lines: dict[int, Line] = {}

    def readable() -> Iterator[Sample]:
        for i, path in enumerate(paths):
            try:
                yield read_sample(path, verifier.image_size, id=str(i))
            except ImageError as error:
                lines[i] = Line(str(error), {"sample_id": str(path), "error": str(error)}, 2)

    found = verifier.scan(readable(), batch)
    for judged in tqdm(found, "verify", len(paths), unit="image", disable=None, leave=False, delay=2):
        i, best = int(judged.sample.id), judged.best
        record = best.record() | {"sample_id": str(paths[i]), "carries": [v.key for v in judged.present]}
        lines[i] = Line(
            f"{one_line(paths[i])}: {judged.sentence()}", record, {True: 0, False: 1, None: 3}[best.present]
        )
        if explain_to:
            save_figure(explain(verifier.detector, judged, paths[i].name), explain_to, 0o600)
            explain_to = None
    return [lines[i] for i in range(len(paths))]


def invert_file(recoverer: Recoverer, path: Path, output: Path) -> dict:
    """Write `latents` and `noise` (C, h, w) and the residuals along the way; return what the solver did."""
    from safetensors.torch import save

    sample = read_sample(path, recoverer.model.image_size)
    recovered = recoverer(torch.from_numpy(to_array(sample.image))[None])
    solution = recovered.solution
    done = {
        "image": str(path),
        "status": solution.status[0].value if len(solution.residuals) else "encoder only",
        "evaluations": int(solution.steps[0]),
        "residual": float(solution.at_value(solution.residuals)[0]) if len(solution.residuals) else None,
        "residuals": solution.residuals[:, 0].tolist(),
        "pixel_residuals": solution.merits[:, 0].tolist(),
        "seconds": recovered.seconds,
        "notes": list(sample.notes),
        **recoverer.settings.as_dict(),
    }
    tensors = {"latents": solution.value[0].cpu().contiguous(), "noise": recovered.noise[0].contiguous()}
    # Of a marked image it is a rough copy of the key.
    write_atomic(output, save(tensors, {"ringmark": json.dumps(done)}), 0o600)
    return done


def facts(model: LatentModel) -> dict:
    """What a model and this installation are."""
    best = recommend(model.recovery, model.latent_shape)
    return {
        "model": model.name,
        "fingerprint": model.identity["fingerprint"],
        "image size": "{}x{}".format(*model.image_size),
        "latent shape": "x".join(map(str, model.latent_shape)),
        "prediction": model.prediction,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "noise recovery": "measured" if model.recovery else "not measured",
        "default mark": f"channels {list(best.channels)}, radii {best.radii[0]}-{best.radii[1]}",
        **{name: version(name) for name in ("ringmark", "torch", "diffusers", "transformers")},
        "python": platform.python_version(),
    }
