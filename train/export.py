"""Write a trained model as a folder that diffusers loads: `PRXPixelPipeline.from_pretrained(folder)`.

    python train/export.py runs/shapes --out exported

Nothing of this project is needed to draw with it: the denoiser is `PRXTransformer2DModel`, the byte-level tower a
`T5EncoderModel` with `ByT5Tokenizer`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])

from train.commandline import read_options  # noqa: E402
from train.errors import UserError, exit_with_sentence  # noqa: E402
from train.recipes import Recipe  # noqa: E402


@dataclass(frozen=True)
class Arguments:
    """Options of export.py."""

    run: Path
    """A run's folder or a checkpoint."""
    out: Path = Path("exported")
    """New or empty folder."""
    weights: Literal["ema", "raw"] = "ema"


def main() -> int:
    import tyro

    Arguments.__annotations__["run"] = Annotated[Path, tyro.conf.Positional]
    arguments = read_options(Arguments, prog="export.py", description=__doc__)
    if not arguments.run.is_dir():
        raise UserError(f"there is no folder {arguments.run}; give a run's folder, or one of its checkpoints/step-N")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise UserError(f"--out {arguments.out} exists and is not an empty folder; nothing was written")
    recipe = export(arguments.run, arguments.out, weights=arguments.weights)
    sampling = recipe.sampling
    print(f"{arguments.out}: pipeline = PRXPixelPipeline.from_pretrained({str(arguments.out)!r})")
    # What diffusers has no setting for, this run may have drawn by.
    other = sampling.time_grid != "diffusers" or (sampling.guidance_kind == "self" and sampling.guidance != 1)
    print(
        f"pipeline(prompt, num_inference_steps={sampling.steps}, guidance_scale={sampling.guidance:g}, "
        "use_resolution_binning=False) draws as "
        + ("train/generate.py --time-grid diffusers --guidance-kind cfg does" if other else "this run did")
    )
    if not recipe.text.clean:
        print("note: text.clean is off in this run, but the pipeline cleans every prompt: give it plain ones")
    return 0


def export(run: Path, out: Path, *, weights: Literal["ema", "raw"] = "ema") -> Recipe:
    """Write the pipeline of a run or checkpoint to `out`; gives the run's recipe.

    Pictures are drawn by `pipeline(prompt, num_inference_steps=…, guidance_scale=…, use_resolution_binning=False)`;
    for the same noise they equal `prx_model.sample`'s.

    Raises:
        UserError: `run` holds no model, or diffusers or transformers are not installed.
    """
    import torch

    from train.run.trained import load_trained

    trained = load_trained(run, torch.device("cpu"), weights=weights)
    try:
        from diffusers import FlowMatchEulerDiscreteScheduler, PRXPixelPipeline, PRXTransformer2DModel
    except ImportError as error:
        raise UserError(f"export.py needs diffusers with PRXPixelPipeline (>= 0.39): {error}") from None
    config, recipe = trained.recipe.model, trained.recipe
    transformer = PRXTransformer2DModel(
        in_channels=config.in_channels,
        patch_size=config.patch_size,
        context_in_dim=config.context_in_dim,
        hidden_size=config.hidden_size,
        mlp_ratio=config.mlp_ratio,
        num_heads=config.num_heads,
        depth=config.depth,
        axes_dim=list(config.axes_dim),
        theta=config.theta,
        bottleneck_size=config.bottleneck_size,
    )
    transformer.load_state_dict(trained.modules.model.state_dict(), strict=True)
    text_encoder, tokenizer = _text(trained.modules.tower)
    pipeline = PRXPixelPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=recipe.sampling.shift),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        default_sample_size=recipe.data.height,
        prompt_max_tokens=recipe.text.max_tokens,
        noise_scale=recipe.sampling.noise_scale,
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    return recipe


def _text(tower: Any) -> tuple[Any, Any]:
    """The text tower as a transformers model and its tokenizer."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    from prx_model.convert import byte_tower_to_t5
    from prx_model.text import MAX_DISTANCE, NORM_EPS, VOCABULARY, ByteTower

    if not isinstance(tower, ByteTower):
        return tower.encoder, tower.tokenizer
    settings = T5Config(
        vocab_size=VOCABULARY,
        d_model=tower.width,
        d_kv=tower.width // tower.num_heads,
        d_ff=2 * tower.width,
        num_layers=len(tower.blocks),
        num_heads=tower.num_heads,
        relative_attention_num_buckets=tower.relative_bias.num_embeddings,
        relative_attention_max_distance=MAX_DISTANCE,
        layer_norm_epsilon=NORM_EPS,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    encoder = T5EncoderModel(settings).eval()
    state = byte_tower_to_t5(tower.state_dict())
    encoder.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]}, strict=True)
    return encoder, ByT5Tokenizer()


if __name__ == "__main__":
    exit_with_sentence(main)
