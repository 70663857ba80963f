"""Count the weights of FLUX.1-dev from its configs, for the memory of verification with and without text encoders.

Nothing is downloaded or allocated: the networks of the true shapes are built on torch's meta device.

    python scripts/count_memory.py
"""

from __future__ import annotations

from typing import Any

import click
import torch
from tabulate import tabulate

BYTES = 2  # of a weight in bfloat16


def parts() -> dict[str, Any]:
    """The modules of FLUX.1-dev on the meta device, by their names in the pipeline."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    t5 = T5Config(
        d_model=4096,
        d_ff=10240,
        d_kv=64,
        num_heads=64,
        num_layers=24,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        return {
            "transformer": FluxTransformer2DModel(
                in_channels=64,
                num_layers=19,
                num_single_layers=38,
                attention_head_dim=128,
                num_attention_heads=24,
                joint_attention_dim=4096,
                pooled_projection_dim=768,
                guidance_embeds=True,
            ),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=16,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            "text_encoder": CLIPTextModel(clip),
            "text_encoder_2": T5EncoderModel(t5),
        }


def table(modules: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Rows (name, millions of weights, GB in bfloat16) of each module and of what verification loads."""
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    lean = sum(count for name, count in counts.items() if not name.startswith("text_encoder"))
    rows = counts | {"verification with text encoders": sum(counts.values()), "verification without": lean}
    return [(name, count / 1e6, count * BYTES / 1e9) for name, count in rows.items()]


@click.command()
def main() -> None:
    """Print the table in Markdown."""
    headers = ("FLUX.1-dev", "million weights", "GB in bfloat16")
    click.echo(tabulate(table(parts()), headers, tablefmt="github", floatfmt=(None, ".0f", ".2f")))


if __name__ == "__main__":
    main()
