"""Pipelines of every family, of the true architectures, with tiny random networks and text encoders.

`build(name)` is a diffusers pipeline that draws from prompts; `build(name, prompts=False)` lacks its text encoders and
tokenizers. Equal names have equal weights. Latents have the family's channels and factor; only the widths are small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BUILDERS: dict[str, Callable[[], Any]] = {}

WIDTH = 16  # of text embeddings
SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CHAT = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
CHAT_OF_PARTS = "{% for m in messages %}[INST]{{ m.content[0].text }}[/INST]{% endfor %}"


def build(name: str, *, prompts: bool = True) -> Any:
    """The pipeline of this name, one of `BUILDERS`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sorted(BUILDERS).index(name))
        pipe = BUILDERS[name]()
    pipe.set_progress_bar_config(disable=True)
    if not prompts:
        pipe.register_modules(**{part: None for part in pipe.components if part.startswith(("text_enc", "tokenizer"))})
    return pipe


def builder(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        BUILDERS[name] = make
        return make

    return register


# Text encoders and tokenizers


def clip(kind: str = "CLIPTextModel") -> tuple[Any, Any]:
    import transformers

    from ringmark.inversion.models.loading import POCKET

    tokenizer = transformers.CLIPTokenizer.from_pretrained(POCKET, subfolder="tokenizer")
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return getattr(transformers, kind)(config).eval(), tokenizer


def t5(width: int = WIDTH) -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [(c, -4.0) for c in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), tokenizer


def alphabet(*special: str) -> dict[str, int]:
    """A vocabulary of these tokens and all bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return {token: i for i, token in enumerate([*special, *sorted(ByteLevel.alphabet())])}


def qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(vocab=alphabet("<|endoftext|>", "<|im_start|>", "<|im_end|>"), model_max_length=4096)
    tokenizer.chat_template = CHAT
    return tokenizer


def decoder_only(tokenizer: Any, layers: int = 2) -> dict[str, Any]:
    """A config of a causal language model."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def qwen3(kind: str, layers: int = 2) -> tuple[Any, Any]:
    import transformers

    tokenizer = qwen_tokenizer()
    return getattr(transformers, kind)(transformers.Qwen3Config(**decoder_only(tokenizer, layers))).eval(), tokenizer


def qwen_vl() -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config=decoder_only(tokenizer)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval(), tokenizer


def mistral() -> tuple[Any, Any]:
    """The pipeline of FLUX.2 reads the layers 10, 20 and 30. Its processor, which needs torchvision, is a tokenizer."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedTokenizerFast

    words = alphabet("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(words), unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_OF_PARTS
    config = Mistral3Config(
        text_config={"model_type": "mistral"} | decoder_only(tokenizer, layers=30),
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        image_token_index=words["[IMG]"],
    )
    return Mistral3ForConditionalGeneration(config).eval(), tokenizer


def byte_level(vocabulary: dict[str, int]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def gemma() -> tuple[Any, Any]:
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    words = {token: i for i, token in enumerate([*special, "▁", *map(chr, range(33, 127))])}
    tokenizer = GemmaTokenizer(vocab=words, model_max_length=4096)
    return Gemma2Model(Gemma2Config(**decoder_only(tokenizer), query_pre_attn_scalar=8)).eval(), tokenizer


# Autoencoders


def autoencoder(channels: int, kind: str = "AutoencoderKL", **config: Any) -> Any:
    """Factor 8, without the convolutions around the latents that only old models have unless `config` says so."""
    import diffusers

    return getattr(diffusers, kind)(
        **{
            "block_out_channels": (8, 8, 8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": channels,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }
        | config
    ).eval()


def autoencoder_flux_2() -> Any:
    """With statistics of latents, which an untrained one lacks."""
    vae = autoencoder(32, "AutoencoderKLFlux2", use_quant_conv=True, use_post_quant_conv=True)
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


# Pipelines


def flow(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def unet(**config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": 16,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 4,
        }
        | config
    ).eval()


def stable(scheduler: Any, kind: Any = None) -> Any:
    from diffusers import StableDiffusionPipeline

    text_encoder, tokenizer = clip()
    return (kind or StableDiffusionPipeline)(
        vae=autoencoder(4, scaling_factor=0.18215, use_quant_conv=True, use_post_quant_conv=True),
        unet=unet(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@builder("stable-diffusion")
def stable_diffusion() -> Any:
    from diffusers import PNDMScheduler

    return stable(PNDMScheduler(**SCALED_LINEAR, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1))


@builder("stable-diffusion-v")
def stable_diffusion_v() -> Any:
    from diffusers import DDIMScheduler

    settings = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return stable(DDIMScheduler(**SCALED_LINEAR, **settings, prediction_type="v_prediction"))


@builder("stable-diffusion-zero-snr")
def stable_diffusion_zero_snr() -> Any:
    from diffusers import DDIMScheduler

    settings = {"clip_sample": False, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "steps_offset": 1}
    return stable(DDIMScheduler(**SCALED_LINEAR, **settings, prediction_type="v_prediction"))


@builder("rectified-flow")
def rectified_flow() -> Any:
    from ringmark.inversion.models.flow import RectifiedFlowPipeline

    return stable(flow(), RectifiedFlowPipeline)


def stable_xl(scheduler: Any) -> Any:
    from diffusers import StableDiffusionXLPipeline

    text_encoder, tokenizer = clip()
    text_encoder_2, tokenizer_2 = clip("CLIPTextModelWithProjection")
    network = unet(
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(4, scaling_factor=0.13025, use_quant_conv=True, use_post_quant_conv=True, force_upcast=True),
        unet=network,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        scheduler=scheduler,
        add_watermarker=False,
    )


@builder("sdxl")
def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler

    return stable_xl(EulerDiscreteScheduler(**SCALED_LINEAR, timestep_spacing="leading", steps_offset=1))


@builder("sdxl-turbo")
def sdxl_turbo() -> Any:
    from diffusers import EulerAncestralDiscreteScheduler

    return stable_xl(EulerAncestralDiscreteScheduler(**SCALED_LINEAR, timestep_spacing="trailing", steps_offset=1))


@builder("sd3")
def sd3() -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    text_encoder, tokenizer = clip("CLIPTextModelWithProjection")
    text_encoder_2, tokenizer_2 = clip("CLIPTextModelWithProjection")
    text_encoder_3, tokenizer_3 = t5(3 * WIDTH)
    network = SD3Transformer2DModel(
        sample_size=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    ).eval()
    return StableDiffusion3Pipeline(
        vae=autoencoder(16, scaling_factor=1.5305, shift_factor=0.0609),
        transformer=network,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
        scheduler=flow(shift=3.0),
    )


def flux_1(scheduler: Any, *, guidance_embeds: bool) -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    text_encoder, tokenizer = clip()
    text_encoder_2, tokenizer_2 = t5()
    network = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    ).eval()
    return FluxPipeline(
        vae=autoencoder(16, scaling_factor=0.3611, shift_factor=0.1159),
        transformer=network,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        scheduler=scheduler,
    )


@builder("flux.1-dev")
def flux_1_dev() -> Any:
    return flux_1(flow(shift=3.0, use_dynamic_shifting=True), guidance_embeds=True)


@builder("flux.1-schnell")
def flux_1_schnell() -> Any:
    return flux_1(flow(shift=1.0), guidance_embeds=False)


def transformer_flux_2(*, guidance_embeds: bool) -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    ).eval()


@builder("flux.2")
def flux_2() -> Any:
    from diffusers import Flux2Pipeline

    text_encoder, tokenizer = mistral()
    return Flux2Pipeline(
        vae=autoencoder_flux_2(),
        transformer=transformer_flux_2(guidance_embeds=True),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=flow(use_dynamic_shifting=True),
    )


@builder("flux.2-klein")
def flux_2_klein() -> Any:
    """The base model, with classifier-free guidance; its text encoder's layers 9, 18 and 27 are read."""
    from diffusers import Flux2KleinPipeline

    text_encoder, tokenizer = qwen3("Qwen3ForCausalLM", layers=27)
    return Flux2KleinPipeline(
        vae=autoencoder_flux_2(),
        transformer=transformer_flux_2(guidance_embeds=False),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=flow(use_dynamic_shifting=True),
    )


@builder("z-image")
def z_image() -> Any:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    text_encoder, tokenizer = qwen3("Qwen3Model")
    network = ZImageTransformer2DModel(
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 8],
        axes_lens=[1024, 64, 64],
    ).eval()
    return ZImagePipeline(
        vae=autoencoder(16, scaling_factor=0.3611, shift_factor=0.1159),
        transformer=network,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=flow(shift=3.0),
    )


@builder("qwen-image")
def qwen_image() -> Any:
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel

    text_encoder, tokenizer = qwen_vl()
    network = QwenImageTransformer2DModel(
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    return QwenImagePipeline(
        vae=AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
        transformer=network,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=flow(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    )


@builder("sana")
def sana() -> Any:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    text_encoder, tokenizer = gemma()
    network = SanaTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
    ).eval()
    stages = {
        "block_out_channels": (8,) * 5 + (32,),
        "layers_per_block": (1,) * 6,
        "qkv_multiscales": ((),) * 5 + ((5,),),
    }
    vae = AutoencoderDC(
        latent_channels=32,
        attention_head_dim=8,
        encoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        decoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        **{f"{side}_{setting}": value for side in ("encoder", "decoder") for setting, value in stages.items()},
        scaling_factor=0.41407,
    ).eval()
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=network,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


@builder("pixart-sigma")
def pixart_sigma() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    text_encoder, tokenizer = t5()
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        sample_size=16,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    ).eval()
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=autoencoder(4, scaling_factor=0.13025, use_quant_conv=True, use_post_quant_conv=True),
        transformer=network,
        scheduler=DPMSolverMultistepScheduler(),
    )
