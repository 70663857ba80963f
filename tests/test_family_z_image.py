"""Z-Image: a list of prompts' embeddings, reversed time, and a scale of guidance that is off at 0."""

from __future__ import annotations

from family import PROMPTS, FamilyTests


class TestZImage(FamilyTests):
    name, family, native = "z-image", "z-image", (1024, 1024)

    def guided(self, guidance):
        return {"guidance_scale": 0.0 if guidance == 1 else guidance}

    def test_prompts_have_their_own_lengths_and_are_not_changed(self, model):
        prompts = list(PROMPTS)
        rows = model.condition(prompts).rows["prompt_embeds"]
        assert prompts == PROMPTS and [len(row) for row in rows] == sorted(len(row) for row in rows)
        assert len(rows[0]) < len(rows[1])
