"""The recipe: one frozen schema behind the YAML files, `--set` and the Python API.

Every key has a default; the defaults are at the paper's scale, while commands use `recipes/tiny.yaml` unless they are
given another recipe. Unknown keys are refused at every level.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bifrost_cli.config.section import (
    RUN_ONLY,
    Count,
    Every,
    NotNegative,
    Positive,
    Section,
    Share,
    recorded_as,
    since,
)

FORMAT = 3  # older ones are read too: see `load.RENAMED`


class Models(Section):
    """The frozen models. `builtin:NAME` is a folder of this package; anything else is a local folder or a hub id."""

    mllm: str = Field("Qwen/Qwen2.5-VL-7B-Instruct", description="the multimodal LLM")
    mllm_revision: str | None = Field(None, description="its commit on the hub; null is the newest")
    diffusion: str = Field("black-forest-labs/FLUX.1-dev", description="the diffusion model")
    diffusion_revision: str | None = Field(None, description="its commit on the hub; null is the newest")
    diffusion_text_tokens: Count = Field(512, description="prompt tokens that the diffusion model reads")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="number format of the frozen weights")
    weights: Literal["dtype", "int8", "nf4"] = Field(
        "dtype",
        description="frozen layers in dtype, or in 8 or 4 bits (the quant extra; not to train a branch); int8 computes "
        "in float16 whatever dtype is, which ends at 65504",
    )


class Images(Section):
    """How images are read, wherever they are read, and the two sizes."""

    input_size: Count = Field(448, description="pixels a side, square, into the encoder")
    output_size: Count = Field(512, description="pixels a side of generated images")
    background: str = Field("white", description="the colour under transparent pixels")
    max_pixels: Count = Field(50_000_000, description="images with more pixels are refused before decoding")
    min_side: Count = Field(32, description="images with a shorter side are refused")
    animated: Literal["first", "skip"] = Field("first", description="animated images: their first frame, or skip")


class Latents(Section):
    """extract-latents: images and captions into a store."""

    encoder: str = Field(
        "mllm",
        pattern=r"^(mllm|vae|builtin:open_clip|open_clip:.+/.+)$",
        description="mllm (its own visual encoder), open_clip:NAME/PRETRAINED, or vae (the diffusion model's)",
    )
    vae: bool = Field(True, description="store its VAE latents too, so that ControlNet training needs no pixels")
    shard_rows: Count = Field(1024, description="rows of a shard, the unit of writing and of resuming")
    chunk_rows: Count = Field(
        16, description="rows of a chunk, the unit of reading; divides shard_rows; a row of 64 kB has its own"
    )
    storage: Literal["float16", "int8"] = Field(
        "float16", description="number format of the stored latents; int8 halves them, at a cosine above 0.999"
    )
    batch_size: Count = Field(32, description="images encoded at once")
    missing_caption: Literal["stop", "skip", "empty"] = Field("stop", description="what a missing caption does")
    bad_image: Literal["stop", "skip"] = Field("stop", description="what an unreadable image does")
    max_bad: Share = Field(0.01, description="with bad_image skip: the share of bad images that stops after all")
    recursive: bool = Field(False, description="look for images in the source's folders too")
    allow_outside: bool = Field(False, description="accept links and paths that leave the source folder")
    image_column: str | None = Field(None, description="a table's column of images or their paths; null guesses it")
    caption_column: str | None = Field(None, description="a table's column of captions; null guesses it")
    flip: bool = Field(False, description="a second row for every image, flipped left to right, caption unchanged")
    captions: Literal["files", "folders"] = Field(
        "files", description="where a folder's captions are: .txt files, or the name of each image's folder"
    )
    captions_per_image: Literal["all", "first", "random"] = Field(
        "all",
        description="of several captions of one image: all (a row each), the first, or one drawn by the image's key",
        json_schema_extra=since("all"),
    )
    caption_extension: str = Field(
        "txt",
        pattern=r"^\w+$",
        description="with captions files: how the text files beside the images end",
        json_schema_extra=since("txt"),
    )
    class_names: str | None = Field(
        None, description="file of lines FOLDER CAPTION, for captions: folders and for archives' .cls"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Latents:
        if self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows ({self.shard_rows}) is not a multiple of chunk_rows ({self.chunk_rows})")
        return self


class Train(Section):
    """One training: AdamW, warm-up, cosine, clipping, averaging, checkpoints."""

    steps: Count = Field(50_000, description="optimizer steps")
    batch_size: Count = Field(32, description="rows of one forward pass, of all processes together")
    accumulate: Count = Field(1, description="forward passes summed into one step")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw",
        description="adamw, or with its averages in 8 bits: a quarter of their memory (the quant extra)",
        json_schema_extra=since("adamw"),
    )
    lr: Positive = Field(5e-4, description="highest learning rate")
    betas: tuple[Share, Share] = Field((0.9, 0.95), strict=False, description="AdamW's two averaging factors")
    weight_decay: NotNegative = Field(0.0, description="AdamW's weight decay")
    warmup: Every = Field(5_000, description="steps from 0 to lr")
    schedule: Literal["cosine", "constant_with_warmup", "warmup_stable_decay"] = Field(
        "cosine",
        description="of lr after the warm-up: falls to 0 over all steps, stays, or stays and falls in the decay_steps; "
        "a finished training goes on with more steps where it stayed (--resume)",
        json_schema_extra=since("cosine"),
    )
    decay_steps: Count | None = Field(
        None,
        description="with schedule warmup_stable_decay: the last steps, in which lr falls to 0",
        json_schema_extra=since(None),
    )
    clip: NotNegative = Field(1.0, description="largest gradient norm; 0 is no clipping")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="decay of the averaged weights; 0 is none")
    ema_warmup: bool = Field(
        False,
        description="averages forget the first weights sooner: decay min(ema, (1 + t) / (10 + t)) at step t",
        json_schema_extra=since(False),
    )
    ema_every: Count = Field(
        1, description="steps between averagings, with the decay of as many", json_schema_extra=since(1)
    )
    precision: Literal["fp32", "bf16"] = Field("bf16", description="arithmetic of the forward pass")
    deterministic: bool = Field(
        False,
        description="on a GPU only kernels that give the same bits each time: slower, and untried by us",
        json_schema_extra=since(False),
    )
    compile: bool = Field(
        False, description="torch.compile what is trained: quicker later, other bits", json_schema_extra=since(False)
    )
    gradient_checkpointing: bool = Field(
        False,
        description="keep only the inputs of layers and compute them again for the gradient: less memory, slower",
        json_schema_extra=RUN_ONLY,
    )
    read_ahead: Every = Field(
        2,
        description="batches read while a step runs (rows, tokens), each by a thread; 0 reads in the step",
        json_schema_extra=RUN_ONLY,
    )
    overlap: bool = Field(
        False,
        description="on a GPU, run the frozen models over the next batch beside the step, on a stream of their own",
        json_schema_extra=RUN_ONLY,
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="several processes: each holds what is trained (ddp), or a part of it (fsdp)",
        json_schema_extra=RUN_ONLY,
    )
    fsdp_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="with fsdp, in what layers are gathered: bf16 is half of the traffic, and other last bits",
        json_schema_extra=since("fp32"),
    )
    seed: Every = Field(0, description="decides order, masks and noise")
    checkpoint_every: Count = Field(1_000, description="steps between checkpoints", json_schema_extra=RUN_ONLY)
    save_in_background: bool = Field(
        False, description="write checkpoints from a copy while training (not with fsdp)", json_schema_extra=RUN_ONLY
    )
    keep: Count = Field(2, description="checkpoints kept", json_schema_extra=RUN_ONLY)
    log_every: Count = Field(
        20, description="steps between progress lines (losses.csv has every step)", json_schema_extra=RUN_ONLY
    )
    validate_every: Every = Field(1_000, description="steps between validations; 0 is never")
    validation_rows: Every = Field(64, description="rows held out for validation, never trained on")
    sample_every: Every = Field(2_000, description="steps between sample grids; 0 is never")
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        (),
        strict=False,
        description="trackers beside the CSV files: tensorboard, wandb, trackio, mlflow (each to be installed)",
        json_schema_extra=RUN_ONLY,
    )

    @model_validator(mode="after")
    def _consistent(self) -> Train:
        if self.validate_every and not self.validation_rows:
            raise ValueError(f"validate_every ({self.validate_every}) needs validation_rows, which is 0")
        if self.fsdp_precision == "bf16" and (self.parallel, self.precision) != ("fsdp", "bf16"):
            raise ValueError("fsdp_precision bf16 is for parallel fsdp and precision bf16")
        if self.overlap and not self.read_ahead:
            raise ValueError("overlap works on a batch that was read ahead, and read_ahead is 0")
        if self.parallel == "fsdp" and self.optimizer == "adamw8bit":
            raise ValueError("optimizer adamw8bit keeps blocks that parallel fsdp would cut; use ddp, or adamw")
        if (self.schedule == "warmup_stable_decay") != (self.decay_steps is not None):
            raise ValueError(
                f"schedule warmup_stable_decay and decay_steps belong together; here they are {self.schedule} and "
                f"{self.decay_steps}"
            )
        if self.decay_steps and self.warmup + self.decay_steps > self.steps:
            raise ValueError(f"warmup ({self.warmup}) and decay_steps ({self.decay_steps}) are more than the steps")
        return self


class Branch(Section):
    """The visual generation branch and its training."""

    target: Literal["latents", "queries"] = Field(
        "latents",
        description="latents of images (paper), or learned queries, trained by the diffusion model's loss",
        json_schema_extra=since("latents"),
    )
    init: Literal["mllm", "random"] = Field(
        "mllm", description="the decoder's start: the MLLM's weights, or random", json_schema_extra=since("mllm")
    )
    head: Literal["linear", "flow", "codebook"] = Field(
        "linear", description="linear (paper), or one that samples every token: a flow, or a codebook of latents"
    )
    codes: Count | None = Field(
        None, description="with head codebook: its k-means centres of latents", json_schema_extra=since(None)
    )
    code_levels: Count = Field(
        1,
        description="with head codebook: codes that are summed to a latent, one after the other",
        json_schema_extra=since(1),
    )
    normalize: bool = Field(
        False, description="predict latents scaled to mean 0, deviation 1 by the store's statistics"
    )
    loss_on: Literal["all", "masked"] = Field("all", description="tokens in the loss")
    mask_mean: Share = Field(1.0, description="mean of the mask ratio's truncated normal")
    mask_sd: Positive = Field(0.25, description="its standard deviation")
    mask_low: Share = Field(0.7, description="its lower end")
    mask_high: Share = Field(1.0, description="its upper end")
    max_text_tokens: Count = Field(300, description="prompt tokens; longer prompts are cut, and counted")
    drop_prompt: Share = Field(0.1, description="share of rows trained on the empty prompt, for guidance")
    plan_share: Share = Field(
        0.0, description="share of rows that see their plan after the caption, where they have one"
    )
    tune: Literal["full", "layers", "lora"] = Field(
        "full",
        description="what is trained: all, or the new parts with the decoder's last layers, or with LoRA",
        json_schema_extra=since("full"),
    )
    layers: Every | None = Field(
        None,
        description="with tune layers: how many of the last; 0 trains the new parts",
        json_schema_extra=since(None),
    )
    lora_rank: Count | None = Field(
        None,
        description="with tune lora: its rank in every linear layer (the lora extra)",
        json_schema_extra=since(None),
    )
    train: Train = Train()

    @model_validator(mode="after")
    def _consistent(self) -> Branch:
        for tune, key in (("layers", "layers"), ("lora", "lora_rank")):
            value = getattr(self, key)
            if (self.tune == tune) != (value is not None):
                raise ValueError(f"tune {tune} and {key} belong together; here they are {self.tune} and {value}")
        for key, usual in (("head", "linear"), ("loss_on", "all"), ("tune", "full")):
            if self.target == "queries" and (value := getattr(self, key)) != usual:
                raise ValueError(f"{key} {value} is not for target queries, which knows {usual} alone")
        if (self.head == "codebook") != (self.codes is not None):
            raise ValueError(f"head codebook and codes belong together; here they are {self.head} and {self.codes}")
        if self.code_levels > 1 and self.head != "codebook":
            raise ValueError(f"code_levels {self.code_levels} is for head codebook, not {self.head}")
        if self.mask_low > self.mask_high:
            raise ValueError(f"mask_low ({self.mask_low}) is above mask_high ({self.mask_high})")
        return self


class ControlNet(Section):
    """The latent ControlNet and its training."""

    control: Literal["controlnet", "cross_attention", "concat"] = Field(
        "controlnet",
        description="how the latents condition FLUX: by a ControlNet, as tokens beside its text, or added to its input",
        json_schema_extra=since("controlnet"),
    )
    double_blocks: Count = Field(4, description="the diffusion model's double blocks copied")
    single_blocks: Every = Field(1, description="its single blocks copied; SD3 has none: 0")
    latent_noise: NotNegative = Field(0.0, description="largest noise on the latents, in channel deviations")
    drop_prompt: Share = Field(0.0, description="share of rows trained without their caption")
    train: Train = Train(lr=1e-4)


class Generate(Section):
    """generate: prompts into images. Options of the command win over these."""

    plan: bool = Field(False, description="the MLLM first writes a dense description, then the branch generates it")
    plan_instruction: str = Field(
        "Describe a picture of {prompt} in one dense paragraph: every object, its colour, size and place.",
        description="what the MLLM is asked; {prompt} stands for the prompt",
    )
    plan_tokens: Count = Field(200, description="longest plan, in tokens")
    region_question: str | None = Field(
        None,
        description="what the MLLM is asked for edit --region, with {region} for its words; null asks for a JSON box",
        json_schema_extra=RUN_ONLY,
    )
    decode_steps: Count = Field(64, description="steps of the branch")
    decode_order: Literal["random", "raster"] = Field(
        "random",
        description="which patches are revealed first: a random order of each image, or row by row",
        json_schema_extra=since("random"),
    )
    branch_guidance: NotNegative = Field(
        1.0,
        description="weight of the prompt in the branch; 1 runs no unconditional half",
        json_schema_extra=recorded_as("guidance"),
    )
    temperature: Positive = Field(
        1.0,
        description="of a sampling head in the branch: below 1 it keeps nearer to what is most probable",
        json_schema_extra=since(1.0),
    )
    steps: Count = Field(28, description="diffusion steps")
    guidance_scale: NotNegative = Field(
        3.5, description="the diffusion model's guidance", json_schema_extra=recorded_as("painter_guidance")
    )
    control_scale: NotNegative = Field(0.7, description="weight of the ControlNet")
    offload: Literal["none", "model", "sequential"] = Field(
        "none",
        description="keep weights in main memory until a part (model) or layer (sequential) needs them; same bytes",
        json_schema_extra=RUN_ONLY,
    )

    @model_validator(mode="after")
    def _consistent(self) -> Generate:
        if "{prompt}" not in self.plan_instruction:
            raise ValueError("plan_instruction does not contain {prompt}, so the plan could not know the prompt")
        if self.region_question is not None and "{region}" not in self.region_question:
            raise ValueError("region_question does not contain {region}, so the MLLM could not know what is meant")
        return self


class Evaluate(Section):
    """eval: samples against a reference."""

    features: str = Field(
        "inception",
        pattern=r"^(inception|builtin:open_clip|open_clip:.+|dinov2:.+)$",
        description="the feature network: inception, open_clip:NAME/PRETRAINED, or dinov2:MODEL",
    )
    clip: str = Field(
        "open_clip:ViT-L-14/openai",
        pattern=r"^(builtin:open_clip|open_clip:.+)$",
        description="the CLIP of --clipscore",
    )
    inception_weights: str | None = Field(None, description="file of FID's weights; null is torch-fidelity's cache")
    lpips_weights: str | None = Field(None, description="file of AlexNet's weights; null is torchvision's cache")
    min_samples: Annotated[int, Field(ge=2)] = Field(2048, description="fewer images than this are refused")


class Shapes(Section):
    """The built-in worlds of shapes, and how the bases that ship with the package are made."""

    world: Literal["shapes", "shapes-2"] = Field("shapes", description="which of the built-in worlds")
    rows: Count = Field(2048, description="rows of the store that extract-latents makes when no source is given")
    seed: Every = Field(0, description="which scenes")
    vae: Train = Field(Train(), description="pretraining of the tiny VAE")
    mllm: Train = Field(Train(), description="pretraining of the tiny MLLM")
    open_clip: Train = Field(Train(), description="pretraining of the tiny open_clip model")
    flux: Train = Field(Train(), description="pretraining of the tiny FLUX and its text encoders")


class Recipe(Section):
    """Everything that decides what is computed."""

    format: Annotated[int, Field(ge=1, le=FORMAT)] = Field(FORMAT, description="version of this schema")
    name: str = Field("paper", description="a short name, for lists")
    claim: str = Field("", description="what it makes, on what machine, how long, which number to expect")
    models: Models = Models()
    images: Images = Images()
    latents: Latents = Latents()
    branch: Branch = Branch()
    controlnet: ControlNet = ControlNet()
    generate: Generate = Generate()
    evaluate: Evaluate = Evaluate()
    shapes: Shapes = Shapes()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.models.weights != "dtype" and self.generate.offload == "sequential":
            raise ValueError(f"generate.offload sequential cannot move weights in {self.models.weights}; model can")
        return self
