"""Drawing into a folder: prompts, resuming, and files that are not its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ringmark.data.reader import read_records
from ringmark.data.scenes import scene
from ringmark.errors import ModelError, StoreError
from ringmark.watermark.embed import Drawn
from ringmark.watermark.tasks import draw as tasks
from ringmark.watermark.tasks.draw import DRAWN, UNSEEN_SCENES, draw, prompts_for

MODEL = SimpleNamespace(
    name="none",
    identity={"name": "none"},
    dtype=torch.float32,
    image_size=(8, 8),
    sampler=lambda name, steps, size: None,
)


@pytest.fixture
def drawn_seeds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of the images that a stand-in for the model draws, in order."""
    seeds: list[int] = []

    def generate(model, prompts, wanted, **settings):
        for prompt, seed in zip(prompts, wanted, strict=True):
            seeds.append(seed)
            yield Drawn(
                image=torch.zeros(3, 8, 8),
                noise=torch.zeros(4, 1, 1),
                prompt=prompt,
                seed=seed,
            )

    monkeypatch.setattr(tasks, "generate", generate)
    return seeds


def run(folder: Path, number: int = 2, **more) -> list[Path]:
    return draw(MODEL, folder, ["a"] * number, 0, key=None, steps=1, guidance=1.0, **more)


def test_prompts_are_taken_in_turn_or_are_captions_of_scenes_nobody_trained_on() -> None:
    assert prompts_for(["a", "b"], 3, 0) == ["a", "b", "a"]
    assert prompts_for([], 2, 5) == [scene(UNSEEN_SCENES + 5).caption, scene(UNSEEN_SCENES + 6).caption]


def test_what_is_there_is_kept_and_what_is_missing_drawn(tmp_path: Path, drawn_seeds: list[int]) -> None:
    first, second = run(tmp_path)
    first.unlink()
    stamp = second.stat().st_mtime_ns
    run(tmp_path, 3)
    assert drawn_seeds == [0, 1, 0, 2] and second.stat().st_mtime_ns == stamp
    assert [row.split(",")[:2] for row in (tmp_path / "labels.csv").read_text().split()[1:]] == [
        [f"000000{i}.png", "0"] for i in range(3)
    ]


def test_a_run_killed_before_a_file_was_written_goes_on(tmp_path: Path, drawn_seeds: list[int], monkeypatch) -> None:
    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tasks, "save_png", die)
        run(tmp_path)
    run(tmp_path)
    assert drawn_seeds == [0, 0, 1] and len(read_records(tmp_path / DRAWN)[1]) == 2


@pytest.mark.parametrize("damage", [b"x", b""])
def test_what_is_no_longer_a_picture_is_drawn_again(tmp_path: Path, drawn_seeds: list[int], damage: bytes) -> None:
    first, _ = run(tmp_path)
    whole = first.read_bytes()
    first.write_bytes(damage or whole[:-1])
    run(tmp_path)
    assert drawn_seeds == [0, 1, 0] and first.read_bytes() == whole


def test_a_model_that_draws_nonsense_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = Drawn(image=torch.full((3, 8, 8), torch.nan), noise=torch.zeros(4, 1, 1), prompt="a", seed=0)
    monkeypatch.setattr(tasks, "generate", lambda *_, **__: [nan])
    with pytest.raises(ModelError) as caught:
        run(tmp_path, 1)
    assert caught.value.code == "model.not-finite" and read_records(tmp_path / DRAWN)[1] == []


@pytest.mark.parametrize("name", ["0000001.png", "labels.csv"])
def test_a_file_that_was_not_drawn_here_is_not_replaced(tmp_path: Path, drawn_seeds: list[int], name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(StoreError) as caught:
        run(tmp_path)
    assert caught.value.code == "results.foreign-image" and caught.value.subject == tmp_path / name
    assert (tmp_path / name).read_text() == "mine" and not drawn_seeds and not (tmp_path / DRAWN).exists()
    run(tmp_path, force=True)
    assert (tmp_path / name).read_bytes() != b"mine"


@pytest.mark.parametrize("name", ["0000000.png", "labels.csv"])
def test_nothing_is_written_through_a_link(tmp_path: Path, drawn_seeds: list[int], name: str) -> None:
    folder, mine = tmp_path / "drawn", tmp_path / "mine"
    run(folder)
    (folder / name).unlink()
    for content in (b"mine", None):
        mine.write_bytes(content) if content else mine.unlink()
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(mine)
        with pytest.raises(StoreError) as caught:
            run(folder)
        assert caught.value.code == "results.foreign-image"
        assert mine.exists() == bool(content)


def test_other_prompts_are_refused(tmp_path: Path, drawn_seeds: list[int]) -> None:
    run(tmp_path)
    with pytest.raises(StoreError) as caught:
        draw(MODEL, tmp_path, ["b"], 0, key=None, steps=1, guidance=1.0)
    assert caught.value.code == "results.other-prompt"
