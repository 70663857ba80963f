"""A tiny Stable Diffusion pipeline in the layout of its authors' checkpoints: the inverse of diffusers' conversion."""

from __future__ import annotations

import re

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
ENDS = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
ENDS |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original(pipe):
    """The tensors of UNet (one layer a block), autoencoder and CLIP by the names of a single file."""
    clip = {key.removeprefix("text_model."): value for key, value in pipe.text_encoder.state_dict().items()}
    tensors = {f"model.diffusion_model.{unet_name(key)}": value for key, value in pipe.unet.state_dict().items()}
    tensors |= {f"cond_stage_model.transformer.text_model.{key}": value for key, value in clip.items()}
    count = len(pipe.vae.config.block_out_channels)
    for key, value in pipe.vae.state_dict().items():
        name = vae_name(key, count)
        tensors[f"first_stage_model.{name}"] = (
            value[..., None, None] if re.search(r"\.[qkv]\.w|j_out\.w", name) else value
        )
    return {key: value.contiguous().clone() for key, value in tensors.items()}


def unet_name(key):
    whole, _, kind = key.rpartition(".")
    if whole in ENDS:
        return f"{ENDS[whole]}.{kind}"
    side, block, what, layer, rest = re.fullmatch(r"(\w+?)_blocks?\.?(\d+)?\.(\w+)\.(\d+)\.(.+)", key).groups()
    rest = re.sub(r"^\w+", lambda found: RESNET[found[0]], rest) if what == "resnets" else rest
    if side == "mid":
        return f"middle_block.{2 * int(layer) if what == 'resnets' else 1}.{rest}"
    first = 2 * int(block) + (side == "down")
    if what == "downsamplers":
        return f"input_blocks.{first + 1}.0.{rest.replace('conv', 'op')}"
    if what == "upsamplers":
        return f"output_blocks.{first + 1}.{2 if block == '0' else 1}.{rest}"
    return f"{'input' if side == 'down' else 'output'}_blocks.{first + int(layer)}.{int(what == 'attentions')}.{rest}"


def vae_name(key, count):
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", key)
    attention = re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(\w+)", key)
    if attention:
        return f"{attention[1]}.mid.attn_1.{ATTENTION[attention[2]]}.{attention[3]}"
    key = re.sub(r"down_blocks\.(\d)", r"down.\1", key)
    key = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{count - 1 - int(found[1])}", key)
    return key.replace("resnets.", "block.").replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
