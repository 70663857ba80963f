"""Remedies for errors: the library states facts with a code, and the command line adds what to do.

A remedy is printed after the fact: "my.key: exists already; choose another name, or replace it with --force". It can
use {subject}, {quoted} (the subject, quoted for a shell) and the error's details, such as {needed}.
"""

from __future__ import annotations

import errno
import shlex

from ringmark.errors import RingmarkError, one_line

__all__ = ["REMEDIES", "explained", "explained_system_error"]

REMEDIES: dict[str, str] = {
    # Pictures and labels
    "image.missing": "check the name",
    "image.folder": "give a file in it, or test all of them with: ringmark audit {quoted}",
    "image.denied": "change its permissions",
    "image.unreadable": "check the name",
    "image.special": "copy it to a regular file",
    "image.empty": "download or copy the file again",
    "image.unknown-format": "convert it to PNG or JPEG",
    "image.too-large": "make it smaller",
    "image.too-costly": "convert it to PNG or JPEG, or make it smaller",
    "image.no-pixels": "download or copy the file again",
    "image.damaged": "download or copy the file again",
    "image.misread": "convert it to RGB",
    "image.no-process": "convert it to PNG or JPEG",
    "image.tiny": "use an image with at least {needed} pixels per side",
    "image.no-folder": "check the name",
    "image.not-folder": "give the folder that contains it",
    "image.unlisted": "change its permissions",
    "image.none": "give a folder with images, which are files named {suffixes}",
    "image.link": "audit the folder it points to separately, or copy it",
    "labels.missing": "check the name",
    "labels.folder": "give a file in it",
    "labels.denied": "change its permissions",
    "labels.unreadable": "check the name",
    "labels.special": "copy it to a regular file",
    "labels.empty": "add a line for each image",
    "labels.encoding": "save the labels as UTF-8",
    "labels.header": "start the file with the line path,label",
    "labels.damaged": "fix that line",
    "labels.value": "give the path of an image and one of the labels {known}",
    "labels.contradiction": "keep one of the two",
    "labels.unmatched": "use paths as in the results, such as {example}; the labels have {given}",
    # Files and results
    "file.missing": "check the name",
    "file.folder": "give a file in it",
    "file.denied": "change its permissions",
    "file.unreadable": "check the name",
    "file.special": "give a regular file",
    "file.too-large": "check the name",
    "file.damaged": "restore it from a copy, or create it again",
    "file.full": "make room on the disk",
    "file.exists": "choose another name, or replace it with --force",
    "file.foreign": "choose another name, or replace it with --force",
    "results.missing": "check the name of the results file",
    "results.folder": "give a results file in it",
    "results.denied": "change its permissions",
    "results.unreadable": "check the name of the results file",
    "results.special": "give a results file",
    "results.unwritable": "choose another name for the output",
    "results.no-space": "make room on the disk",
    "results.locked": "wait until that run ends, or choose another output",
    "results.settings": "use the settings of the first run, or choose another output",
    "results.foreign": "choose another file",
    "results.version": "choose another file, or use the version of ringmark that wrote it",
    "results.damaged": "remove line {line}, or choose another file",
    "results.incomplete": "remove line {line}, or audit into another file",
    "results.part": "remove it, and audit its images again",
    "results.no-pyarrow": 'install it with: pip install "ringmark[scale]"',
    "results.id": "use the name of the image as the sample_id",
    "results.foreign-image": "choose another folder, or replace it with --force",
    "results.other-prompt": "choose another folder with -o, or other seeds with --seed",
    # Models
    "model.device": "choose another device with --device",
    "model.not-one": 'give "pocket", a diffusers folder, a hub id or a .safetensors file',
    "model.unreachable": "check the name and the network, or give the model's folder",
    "model.damaged": "download or save the model again",
    "model.incomplete": "download or save the model again",
    "model.pickled": "where you trust the file, load it with diffusers and save it with "
    "save_pretrained(FOLDER, safe_serialization=True)",
    "model.no-configs": "put that folder at {folder}, or put the file into it",
    "model.part": "install the version of diffusers that saved the model, or fix its model_index.json",
    "model.no-peft": 'install it with: pip install "ringmark[lora]"',
    "model.lora": "give a LoRA made for this model",
    "model.offload": "omit --offload",
    "model.lora-missing": "check the name",
    "model.conditioning": "use a text-to-image model",
    "model.prediction": "check the prediction_type in scheduler/scheduler_config.json",
    "model.no-noise": "use a text-to-image pipeline",
    "model.from-picture": "mark a text-to-image pipeline",
    "model.marked": "remove its mark first",
    "model.sampler": "choose another with --sampler",
    "model.family": "use a text-to-image model of a supported family",
    "model.size": "choose sides that are multiples of {multiple}",
    "model.sample-size": "fix unet/config.json in the model's folder",
    "model.scaling": "fix vae/config.json in the model's folder",
    "model.no-signal": "such a schedule needs a network that predicts v; check the scheduler's prediction_type",
    "model.no-text": "load it with its text encoders",
    "model.recovery-damaged": "measure it again with scripts/measure_recovery.py",
    "model.steps": "choose another number with --steps",
    "recovery.method-unknown": "choose one of these with --method",
    # Keys and schemes
    "key.missing": "make one with: ringmark keygen -o {quoted}",
    "key.folder": "give a key file, or the number of new keys with -n",
    "key.denied": "change its permissions",
    "key.unreadable": "check the name",
    "key.special": "give a key file",
    "key.too-large": "use the file that ringmark keygen wrote",
    "key.damaged": "use the file that ringmark keygen wrote",
    "key.fingerprint": "restore it from a copy",
    "key.readable": "run: chmod 600 {quoted} (or set RINGMARK_READABLE_KEYS=1 if that is not possible)",
    "key.exists": "choose another name, or replace it with --force, after which marks made with the old key are lost",
    "key.unwritable": "choose another name",
    "key.not-a-folder": "with -n, give a folder for the keys with -o",
    "key.unlisted": "give a folder of keys",
    "key.duplicate": "remove one of the two",
    "key.none": "give another folder, or make keys with: ringmark keygen -n 4 -o {quoted}",
    "key.not-given": "give a key with --key",
    "key.latents": "use --model {model}",
    "detector.alpha": "choose another level with --alpha",
    "scheme.registered": "choose another name",
    "scheme.unknown": "choose one of these with --scheme",
    "scheme.parameter": "see ringmark keygen --help",
    "scheme.another": "use a key of this scheme",
    "scheme.pattern": "see ringmark keygen --help",
    "scheme.channels": "choose others with --channels",
    "scheme.radii": "choose others with --radii",
    "scheme.budget": "raise --budget, or give --channels and --radii",
    "scheme.description": "use the file that ringmark keygen wrote",
    "scheme.values": "use the file that ringmark keygen wrote",
    "scheme.size": "choose a larger --size, or make a key with lower radii",
    "scheme.unranked": "omit the key, or give a --calibration of this size and for these options",
    "scheme.old-key": "make a new key, which works at every size, with: ringmark keygen",
    "scheme.noise": "use a key made for these latents",
    "scheme.unfindable": "widen --radii or --channels",
    "scheme.no-free-numbers": "omit -n, or choose another mark",
    "scheme.crowded": "ask for fewer keys, or widen --radii or --channels",
    "scheme.no-shifts": "omit the key, or --search",
    "scheme.no-search": "omit the key, or --search",
    "scheme.no-picture": "omit --plot",
    # Calibration
    "calibration.missing": "make it with: ringmark calibrate FOLDER -o {quoted}",
    "calibration.folder": "give a calibration file in it",
    "calibration.denied": "change its permissions",
    "calibration.unreadable": "check the name",
    "calibration.special": "give a calibration file",
    "calibration.too-large": "use the file that ringmark calibrate wrote",
    "calibration.damaged": "make it with: ringmark calibrate FOLDER -o {quoted}",
    "calibration.fingerprint": "restore it from a copy, or calibrate again",
    "calibration.unwritable": "choose another name",
    "calibration.too-few": "add images",
    "calibration.sources": "count every image once",
    "calibration.not-finite": "leave them out",
    "calibration.degenerate": "use images with some texture",
    "calibration.level": "calibrate with at least {needed} images, or raise --alpha",
    "calibration.size": "omit the calibration, or calibrate with images of this size",
    "calibration.channels": "use a calibration of this model",
    "calibration.reach": "omit the calibration, or make a key with smaller radii",
    "calibration.settings": "use those settings, or calibrate again with these",
    "calibration.marked": "omit it: a calibration needs unmarked images, such as those of generate --no-mark",
    "calibration.same-noise": "remove one of the two, or draw it with another --seed",
    "calibration.model": "use that model, or calibrate this one",
    "calibration.no-recovery": "calibrate with at least {needed} images drawn by ringmark generate --no-mark, "
    "or only give --channels and --radii",
    # Evaluation and audits
    "evaluation.fpr": "give a rate such as 0.01",
    "evaluation.classes": "label images of both kinds",
    "evaluation.scores": "omit images with inconclusive verdicts",
    "evaluation.few": "add images, or raise the FPR",
    "evaluation.confusion": "number the keys accordingly",
    "evaluation.unlabelled": "paths must be like {example}",
    "evaluation.number": "audit that image again, or give results written by ringmark audit",
    "evaluation.twice": "give only one of the two files, or audit a folder that contains both",
    "evaluation.settings": "run ringmark roc on each of them separately",
    "evaluation.keys": "give that key with --key",
    "evaluation.same-key": "give each key once",
    "evaluation.methods": "give each method once",
    "evaluation.output": "choose another folder with -o",
    "evaluation.overlap": "keep marked and unmarked images apart",
    "evaluation.carried": "give the key that they carry",
    "evaluation.labels": "give {kind} images as --{kind}",
    "evaluation.calibration": "use those settings, or omit the calibration",
    "evaluation.images": "give images that can be read",
    # Attacks
    "attack.one-file": "give a folder",
    "attack.not-png": "use a name that ends in .png",
    "attack.source": "choose another OUT",
    "attack.inside": "choose another OUT",
    "attack.collision": "rename one of the two",
    "attack.foreign": "choose another OUT, or replace it with --force",
    "attack.settings": "choose another OUT, or replace it with --force",
    "attack.empty": "write attacks such as jpeg:25+blur:4",
    "attack.unknown": "choose from {known}, or use a preset alone: {presets}",
    "attack.strength": "{name} takes: {range}",
    "attack.model": "give a model with --model",
    "attack.size": "make the image smaller",
    "attack.nan": "use --dtype float32",
}
"""Remedies by code. They cover exactly the codes that the library raises (tests/test_remedies.py)."""

SYSTEM_REMEDIES = {errno.ENOSPC: "make room on the disk", errno.EDQUOT: "make room on the disk"}


def explained(error: RingmarkError) -> str:
    """The error in one line, "subject: fact; remedy", or just the error if it has no remedy."""
    template = REMEDIES.get(error.code)
    if template is None:
        return one_line(error)
    subject = str(error.subject)
    remedy = template.format_map({"subject": subject, "quoted": shlex.quote(subject), **error.details})
    return one_line(f"{error}; {remedy}")


def explained_system_error(error: OSError) -> str:
    """An operating system error in one line, in the same form."""
    remedy = SYSTEM_REMEDIES.get(error.errno or 0, "check the name, or choose another")
    return one_line(f"{error.filename or 'system'}: {error.strerror}; {remedy}")
